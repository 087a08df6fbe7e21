"""The four files of DINO's eval_knn.py; what the command writes is in test_features.py."""

import random
import re

import numpy as np
import pytest
import torch

from dino.evaluation.feature_files import dump_features, load_features
from dino.runtime.options import UserError

NAMES = ("trainfeat", "trainlabels", "testfeat", "testlabels")


def features(count, seed, dtype=np.float32):
    noise = np.random.default_rng(seed)
    return noise.normal(size=(count, 6)).astype(dtype), noise.integers(0, 3, count)


def dump_as_dino(folder, train, train_labels, test, test_labels):
    """What the original does with its features: normalises them and saves plain tensors."""
    folder.mkdir()
    for name, rows in (("trainfeat", train), ("testfeat", test)):
        torch.save(torch.nn.functional.normalize(torch.from_numpy(rows), dim=1, p=2), folder / f"{name}.pth")
    for name, labels in (("trainlabels", train_labels), ("testlabels", test_labels)):
        torch.save(torch.from_numpy(labels).long(), folder / f"{name}.pth")


def load_as_dino(folder):
    return [torch.load(folder / f"{name}.pth", weights_only=True) for name in NAMES]


def unit(rows):
    rows = rows.astype(np.float64)
    return rows / np.sqrt((rows**2).sum(1, keepdims=True))


def test_what_the_original_dumps_is_loaded(tmp_path):
    sets = (*features(7, 0), *features(3, 1))
    dump_as_dino(tmp_path / "theirs", *sets)
    train, train_labels, test, test_labels = load_features(str(tmp_path / "theirs"))
    np.testing.assert_allclose(train, unit(sets[0]), atol=1e-6)
    np.testing.assert_allclose(test, unit(sets[2]), atol=1e-6)
    np.testing.assert_array_equal(train_labels, sets[1])
    np.testing.assert_array_equal(test_labels, sets[3])
    assert [array.dtype for array in (train, train_labels, test, test_labels)] == [np.float32, np.int64] * 2


def test_what_is_dumped_is_what_the_original_dumps(tmp_path):
    sets = (*features(7, 0), *features(3, 1))
    dump_as_dino(tmp_path / "theirs", *sets)
    dump_features(str(tmp_path / "deep" / "ours"), *sets)
    ours = tmp_path / "deep" / "ours"
    assert sorted(path.name for path in ours.iterdir()) == sorted(f"{name}.pth" for name in NAMES)
    for found, expected in zip(load_as_dino(ours), load_as_dino(tmp_path / "theirs"), strict=True):
        assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_half_precision_is_written_as_float32_and_what_is_handed_in_stays_as_it_is(tmp_path):
    rows, labels = features(5, 0, np.float16)
    rows *= 100  # squares of these are beyond float16
    before = rows.copy()
    dump_features(str(tmp_path), rows, labels, rows, labels)
    written = load_as_dino(tmp_path)[0]
    assert written.dtype == torch.float32
    np.testing.assert_allclose(written, unit(rows), atol=1e-6)
    np.testing.assert_array_equal(rows, before)


def test_features_of_zeros_stay_zeros(tmp_path):
    dump_features(str(tmp_path), np.zeros((2, 3)), np.array([0, 1]), np.ones((1, 3)), np.array([0]))
    assert torch.equal(load_as_dino(tmp_path)[0], torch.zeros(2, 3))


def test_memory_maps_can_be_dumped(tmp_path):
    rows, labels = features(5, 0)
    np.save(tmp_path / "rows.npy", rows)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    dump_features(str(tmp_path), mapped, labels, mapped, labels)
    np.testing.assert_allclose(load_features(str(tmp_path))[0], unit(rows), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_and_labels_of_other_kinds_are_loaded(tmp_path, dtype):
    content = (torch.ones(2, 3), torch.tensor([0, 1]), torch.ones(1, 3), torch.tensor([1]))
    for name, tensor in zip(NAMES, content, strict=True):
        changed = tensor.to(dtype).requires_grad_() if name.endswith("feat") else tensor.to(torch.int32)
        torch.save(changed, tmp_path / f"{name}.pth")
    train, labels, _, _ = load_features(str(tmp_path))
    assert (train.dtype, labels.dtype) == (np.float32, np.int64) and (train == 1).all()


def refused(folder, sentence):
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        load_features(str(folder))


def test_files_that_are_missing_damaged_or_do_not_fit_are_one_sentence(tmp_path):
    refused(
        tmp_path / "nowhere",
        f"{tmp_path}/nowhere/trainfeat.pth is missing; --load_features needs trainfeat.pth, trainlabels.pth, "
        "testfeat.pth, testlabels.pth",
    )
    dump_features(str(tmp_path), *features(7, 0), *features(3, 1))
    torch.save({"features": torch.ones(2)}, tmp_path / "testlabels.pth")
    refused(tmp_path, f"{tmp_path}/testlabels.pth holds a dict, not a tensor")
    torch.save(torch.zeros(4, dtype=torch.int64), tmp_path / "testlabels.pth")
    refused(tmp_path, f"features and labels in {tmp_path} do not fit: shapes (3, 6) and (4,)")
    (tmp_path / "testfeat.pth").unlink()
    (tmp_path / "testfeat.pth").mkdir()
    refused(
        tmp_path, f"{tmp_path}/testfeat.pth cannot be read as a tensor; write it again with --dump_features"
    )


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (
            "trainlabels",
            torch.full((7,), 0.5),
            "features must be floats and labels integers; {} holds float32 and",
        ),
        (
            "testfeat",
            torch.ones(3, 6, dtype=torch.complex64),
            "features must be floats and labels integers; {}",
        ),
        ("testfeat", torch.ones(3, 0), "the features in {} are empty: shape (3, 0)"),
        (
            "trainfeat",
            torch.ones(7, 6).to_sparse(),
            "{}/trainfeat.pth cannot be read as a tensor; write it again",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_tensors_that_are_no_features_or_labels_are_one_sentence(tmp_path, name, content, sentence):
    dump_features(str(tmp_path), *features(7, 0), *features(3, 1))
    torch.save(content, tmp_path / f"{name}.pth")
    with pytest.raises(UserError, match="^" + re.escape(sentence.format(tmp_path))):
        load_features(str(tmp_path))


def test_no_damage_to_a_file_ends_in_anything_but_a_sentence(tmp_path):
    dump_features(str(tmp_path), *features(7, 0), *features(3, 1))
    file = tmp_path / "trainfeat.pth"
    whole = file.read_bytes()
    generator = random.Random(0)
    for round_ in range(200):
        content = bytearray(whole)
        if round_ % 4 == 0:
            content = content[: generator.randrange(len(content))]
        else:
            for _ in range(1 + round_ % 7):
                content[generator.randrange(len(content))] = generator.randrange(256)
        if round_ % 10 == 9:
            content = bytearray(b"\x80\x02") + content  # as an old pickle
        file.write_bytes(content)
        try:
            load_features(str(tmp_path))
        except UserError as error:
            assert "trainfeat.pth" in str(error) or "do not fit" in str(error)


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(
        UserError, match=r"^cannot write into --dump_features .*/file: File exists; name another"
    ):
        dump_features(str(tmp_path / "file"), *features(7, 0), *features(3, 1))
    assert (tmp_path / "file").read_text() == "mine"
