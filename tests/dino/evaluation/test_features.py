"""The command that writes frozen features, end to end."""

import errno
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from dino.evaluation import feature_files, features
from dino.evaluation.extraction import Preparation
from dino.evaluation.kinds import KINDS
from dino.runtime.backbones import create_backbone, tokens
from dino.runtime.pictures import open_pictures
from tests.dino.small_runs import write_pictures

SMALL = (
    *("--arch", "xcit_pico_3_p8", "--pretrained_weights", "random", "--image_size", "16", "--device", "cpu"),
    *("--num_workers", "0", "--precision", "fp32"),
)


@pytest.fixture
def photos(tmp_path):
    """Two classes of four pictures; one is broken."""
    write_pictures(tmp_path / "photos", count=4)
    (tmp_path / "photos" / "cats" / "1.png").write_bytes(b"no picture")
    return tmp_path / "photos"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the command into `out`; returns what it prints."""

    def run(*arguments):
        monkeypatch.setattr(
            sys, "argv", ["features", *map(str, arguments), "--output_dir", str(tmp_path / "out")]
        )
        features.main("features")
        return capsys.readouterr().out

    return run


@pytest.fixture
def mistake(run, capsys):
    """Runs the command with a mistake; returns the sentence."""

    def mistake(*arguments):
        with pytest.raises(SystemExit) as stop:
            run(*arguments)
        assert stop.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("features: ")]
        (sentence,) = lines
        return sentence

    return mistake


@pytest.fixture
def expected(photos):
    """Class tokens and means of the patch tokens of the readable pictures, straight from the backbone."""
    torch.manual_seed(0)
    backbone = create_backbone("xcit_pico_3_p8").eval()
    pictures = open_pictures(str(photos))
    readable = [index for index in range(8) if index != 1]
    images = torch.stack([Preparation(size=16).transform()(pictures.picture(index)) for index in readable])
    with torch.no_grad():
        class_tokens, patch_tokens = tokens(backbone, images)
    return {
        "cls": class_tokens.numpy(),
        "patch_mean": patch_tokens.mean(1).numpy(),
        "patch_tokens": patch_tokens.numpy(),
        "names": [pictures.name(index) for index in readable],
    }


def files(folder):
    """All of them, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def assert_holds(arrays, expected, kinds=("cls", "patch_mean")):
    assert set(arrays) == {*kinds, "names", "labels", "classes"}
    for kind in kinds:
        np.testing.assert_allclose(arrays[kind], expected[kind], atol=1e-5)
    assert arrays["names"].tolist() == expected["names"]
    assert arrays["labels"].tolist() == [0, 0, 0, 1, 1, 1, 1] and arrays["labels"].dtype == np.int64
    assert arrays["classes"].tolist() == ["cats", "dogs"]


def test_one_file_of_arrays_holds_what_the_backbone_gives(run, photos, tmp_path, expected):
    output = run(*SMALL, "--data_path", photos)
    with np.load(tmp_path / "out" / "pictures.npz") as arrays:
        assert_holds(arrays, expected)
    assert f"{tmp_path}/out/pictures.npz: cls (7, 96), patch_mean (7, 96) float32" in output
    assert files(tmp_path / "out") == ["pictures.json", "pictures.npz"]


def test_a_folder_of_arrays_can_be_mapped_into_memory(run, photos, tmp_path, expected):
    run(*SMALL, "--data_path", photos, "--format", "npy", "--kinds", "patch_tokens", "cls")
    folder = tmp_path / "out" / "pictures"
    arrays = {path.stem: np.load(path, mmap_mode="r") for path in folder.iterdir()}
    assert_holds(arrays, expected, ("patch_tokens", "cls"))
    assert arrays["patch_tokens"].shape == (7, 4, 96)


def test_arrays_of_another_time_do_not_stay_beside_the_new_ones(run, photos, tmp_path):
    run(*SMALL, "--data_path", photos, "--format", "npy")
    (tmp_path / "out" / "pictures" / "mine.npy").write_bytes(b"mine")
    (photos / "cats" / "1.png").unlink()
    run(*SMALL, "--data_path", photos / "cats", "--format", "npy", "--kinds", "patch_mean")
    left = {path.name for path in (tmp_path / "out" / "pictures").iterdir()}
    assert left == {"patch_mean.npy", "names.npy", "classes.npy", "mine.npy"}


def test_a_table_has_a_row_per_picture(run, photos, tmp_path, expected, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(feature_files, "_ROWS_PER_GROUP", 3)
    run(*SMALL, "--data_path", photos, "--format", "parquet", "--kinds", "cls", "patch_tokens")
    table = parquet.read_table(tmp_path / "out" / "pictures.parquet").to_pydict()
    assert list(table) == ["name", "label", "class", "cls", "patch_tokens"]
    assert table["name"] == expected["names"]
    assert table["label"] == [0, 0, 0, 1, 1, 1, 1] and table["class"] == ["cats"] * 3 + ["dogs"] * 4
    np.testing.assert_allclose(table["cls"], expected["cls"], atol=1e-5)
    np.testing.assert_allclose(table["patch_tokens"], expected["patch_tokens"].reshape(7, -1), atol=1e-5)
    assert files(tmp_path / "out") == ["pictures.json", "pictures.parquet"]


def test_a_table_without_pyarrow_is_refused_with_the_name_of_the_extra(
    mistake, photos, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    sentence = mistake(*SMALL, "--data_path", photos, "--format", "parquet")
    assert sentence == (
        "features: --format parquet needs pyarrow: pip install pyarrow (or dino-xcit[parquet]), or take npz"
    )
    assert not (tmp_path / "out").exists()


def test_all_kinds_of_a_vit_in_half_precision(run, photos, tmp_path):
    vit = ("--arch", "vit_tiny", "--patch_size", 8, "--pretrained_weights", "random", "--image_size", 16)
    output = run(*vit, "--data_path", photos, "--kinds", *KINDS, "--precision", "bf16", "--device", "cpu")
    with np.load(tmp_path / "out" / "pictures.npz") as arrays:
        shapes = {kind: arrays[kind].shape for kind in KINDS}
        assert all(arrays[kind].dtype == np.float16 for kind in KINDS)
        np.testing.assert_array_equal(arrays["cls_last_4"][:, -192:], arrays["cls"])
    assert shapes == {
        "cls": (7, 192),
        "patch_mean": (7, 192),
        "cls_last_4": (7, 768),
        "patch_tokens": (7, 4, 192),
    }
    assert output.rstrip().endswith("float16")


def test_kinds_that_are_unknown_or_not_to_be_had_are_one_sentence(mistake, photos, tmp_path):
    sentence = mistake(*SMALL, "--data_path", photos, "--kinds", "cls", "clss")
    assert (
        sentence
        == "features: --kinds takes one or more of cls, patch_mean, cls_last_4, patch_tokens; got clss"
    )
    assert not (tmp_path / "out").exists()
    sentence = mistake(*SMALL, "--data_path", photos, "--kinds", "cls_last_4")
    assert sentence == "features: --kinds cls_last_4: xcit_pico_3_p8 is no ViT with a class token"


def test_the_facts_beside_tell_what_was_made_how_and_what_is_left_out(run, photos, tmp_path):
    output = run(*SMALL, "--data_path", photos)
    broken = f"{photos}/cats/1.png: not a picture that Pillow can read"
    assert f"left out: {broken}" in output
    facts = json.loads((tmp_path / "out" / "pictures.json").read_text())
    assert facts["broken"] == [broken] and facts["classes"] == ["cats", "dogs"]
    assert (facts["arch"], facts["weights"], facts["seed"]) == ("xcit_pico_3_p8", "random", 0)
    assert facts["preprocessing"] == {
        "size": 16,
        "resize_ratio": 256 / 224,
        "precision": "fp32",
        "as_stored": False,
    }
    assert facts["data_path"] == str(photos) and len(facts["data_sha256"]) == 64
    assert facts["command"].startswith("python features --arch xcit_pico_3_p8")


def test_a_folder_with_train_and_val_gives_two(run, photos, tmp_path):
    (tmp_path / "both").mkdir()
    photos.rename(tmp_path / "both" / "train")
    write_pictures(tmp_path / "both" / "val", count=2, seed=1)
    run(*SMALL, "--data_path", tmp_path / "both")
    assert files(tmp_path / "out") == ["train.json", "train.npz", "val.json", "val.npz"]
    for name, count in (("train", 7), ("val", 4)):
        with np.load(tmp_path / "out" / f"{name}.npz") as arrays:
            assert len(arrays["cls"]) == len(arrays["names"]) == len(arrays["labels"]) == count
            assert all(f"/{name}/" in picture for picture in arrays["names"])


def test_pictures_without_classes_need_none(run, photos, tmp_path):
    (photos / "cats" / "1.png").unlink()
    run(*SMALL, "--data_path", photos / "cats")
    with np.load(tmp_path / "out" / "pictures.npz") as arrays:
        assert "labels" not in arrays and arrays["classes"].shape == (0,) and arrays["cls"].shape == (3, 96)


def test_pictures_can_be_read_as_they_are_stored(run, tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    noise = np.random.default_rng(0).integers(0, 256, (20, 40, 3), np.uint8)
    (tmp_path / "odd").mkdir()
    Image.fromarray(noise).save(tmp_path / "odd" / "turned.jpg", exif=turned)
    rows = []
    for flags in ((), ("--as_stored",)):
        run(*SMALL, "--data_path", tmp_path / "odd", *flags)
        with np.load(tmp_path / "out" / "pictures.npz") as arrays:
            rows.append(arrays["cls"])
    assert not np.allclose(rows[0], rows[1], atol=1e-3)


def test_kept_features_are_reused_for_another_format(run, photos, tmp_path, monkeypatch):
    keep = ("--features_dir", tmp_path / "kept")
    run(*SMALL, "--data_path", photos, *keep)
    monkeypatch.setattr(
        "dino.evaluation.extraction.Extractor.fill", lambda *_, **__: pytest.fail("read again")
    )
    output = run(*SMALL, "--data_path", photos, *keep, "--format", "npy")
    assert "pictures features: reused from " in output and output.count("left out: ") == 1
    with np.load(tmp_path / "out" / "pictures.npz") as arrays:
        for name in arrays:
            np.testing.assert_array_equal(
                arrays[name], np.load(tmp_path / "out" / "pictures" / f"{name}.npy")
            )


@pytest.mark.parametrize("form", ["npy", "npz", "parquet"])
def test_a_disk_that_is_full_in_the_end_is_one_sentence_and_leaves_nothing(
    mistake, photos, tmp_path, monkeypatch, form
):
    if form == "parquet":
        pytest.importorskip("pyarrow")

    def full(path, *_):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(feature_files, "_with_file", full)
    monkeypatch.setattr(feature_files, "_write_table", full)
    sentence = mistake(*SMALL, "--data_path", photos, "--format", form)
    assert sentence.startswith(f"features: cannot write {tmp_path}/out/pictures")
    assert "No space left on device" in sentence
    assert files(tmp_path / "out") == [] and not list((tmp_path / "out").glob(".*"))


def test_a_disk_that_is_too_small_is_told_before_the_work(mistake, photos, tmp_path, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert "features: the features of 8 pictures need " in mistake(*SMALL, "--data_path", photos)
    assert files(tmp_path / "out") == [] and not list((tmp_path / "out").iterdir())


def test_room_is_needed_for_the_file_and_for_the_rows_beside_it(run, mistake, photos, tmp_path, monkeypatch):
    usage, rows = shutil.disk_usage("/"), 8 * 2 * 96 * 4
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2 * rows - 1))
    sentence = mistake(*SMALL, "--data_path", photos)
    assert sentence == (
        f"features: the features of 8 pictures need 0.0 MB in {tmp_path}/out, where 0.0 MB are free; "
        "name another folder with --output_dir"
    )
    assert not list((tmp_path / "out").iterdir())
    run(*SMALL, "--data_path", photos, "--features_dir", tmp_path / "kept")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2 * rows))
    run(*SMALL, "--data_path", photos)


def test_a_folder_that_is_a_file_is_one_sentence(mistake, photos, tmp_path):
    (tmp_path / "out").write_text("mine")
    sentence = mistake(*SMALL, "--data_path", photos)
    assert sentence.startswith(f"features: cannot write into --output_dir {tmp_path}/out: File exists")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--data_path", "/nowhere/at/all"), "/nowhere/at/all is no file or folder"),
        (("--image_size", "0"), "--image_size must be 1 or more, got 0"),
        (("--batch_size_per_gpu", "0"), "--batch_size_per_gpu must be 1 or more, got 0"),
        (("--num_workers", "-1"), "--num_workers must be 0 or more, got -1"),
        (("--seed", "-1"), "--seed must be 0 or more, got -1"),
        (("--arch", "xcit_pico_3_p9"), "unknown model 'xcit_pico_3_p9'; did you mean xcit_pico_3_p8"),
        (("--pretrained_weights", "nothing.pth"), "there is no file nothing.pth"),
    ],
)
def test_a_mistake_in_the_options_is_one_sentence_and_leaves_nothing(
    mistake, photos, tmp_path, arguments, sentence
):
    assert f"features: {sentence}" in mistake(*SMALL, "--data_path", photos, *arguments)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
