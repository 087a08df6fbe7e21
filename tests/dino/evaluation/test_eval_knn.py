import json
from functools import partial

import numpy as np
import PIL.Image
import pytest
import torch
from torchvision import datasets, transforms

from dino.evaluation import eval_knn
from dino.runtime.backbones import create_backbone
from tests.dino.small_runs import write_pictures

SMALL = (
    *("--arch", "xcit_pico_3_p8", "--pretrained_weights", "random", "--image_size", "16"),
    *("--num_workers", "0", "--device", "cpu"),
)


@pytest.fixture
def folder(tmp_path):
    """Two classes told apart by colour, and one broken file."""
    write_pictures(tmp_path / "train", count=6)
    write_pictures(tmp_path / "val", count=3, seed=1)
    (tmp_path / "train" / "cats" / "0.png").write_bytes(b"no picture")
    return tmp_path


@pytest.fixture
def knn(call):
    """Runs the command; returns what it prints."""
    return partial(call, eval_knn.main)


@pytest.fixture
def mistake(call):
    """Runs the command with a mistake; returns the sentence."""
    return partial(call, eval_knn.main, code=2)


def dinos_lines(output):
    return [line for line in output.splitlines() if "classifier result" in line]


def as_dino(arch, weights, folder, size, ks, temperature=0.07, dtype=torch.float32):
    """Top-1 and top-5 in percent by the steps that the original documents, with torchvision's folder and loader."""
    transform = transforms.Compose(
        [
            transforms.Resize(round(size * 256 / 224), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    backbone = create_backbone(arch, 8).eval()
    backbone.load_state_dict(torch.load(weights, weights_only=True))
    features, labels = {}, {}
    for part in ("train", "val"):
        pictures = datasets.ImageFolder(str(folder / part), transform)
        loader = torch.utils.data.DataLoader(pictures, batch_size=32)
        with torch.no_grad():
            rows = torch.cat([backbone(images) for images, _ in loader]).to(dtype)
        features[part] = torch.nn.functional.normalize(rows, dim=1)
        labels[part] = torch.tensor(pictures.targets)
    similarity = features["val"] @ features["train"].T
    classes = int(labels["train"].max()) + 1
    accuracies = {}
    for k in ks:
        cosine, nearest = similarity.topk(min(k, similarity.shape[1]), dim=1)
        votes = torch.zeros(len(similarity), classes, dtype=dtype)
        votes.scatter_add_(1, labels["train"][nearest], (cosine / temperature).exp())
        ranking = votes.sort(dim=1, descending=True).indices == labels["val"][:, None]
        accuracies[k] = tuple(
            100 * ranking[:, :count].any(1).double().mean().item() for count in (1, min(5, k))
        )
    return accuracies


def printed(output):
    words = [line.replace(",", "").split() for line in dinos_lines(output)]
    return {int(line[0].removesuffix("-NN")): (float(line[4]), float(line[6])) for line in words}


@pytest.mark.parametrize("arch", ["xcit_pico_3_p8", "vit_tiny", "resnet10t.c3_in1k"])
def test_accuracies_equal_the_originals_to_the_last_picture(tmp_path, knn, arch):
    random = np.random.default_rng(0)
    for part, count in (("train", 15), ("val", 7)):
        for label in range(5):
            (tmp_path / part / f"class{label}").mkdir(parents=True)
            for index in range(count):
                height, width = random.integers(20, 60, 2)
                coarse = random.integers(0, 200, (4, 4, 3)) + 10 * label
                picture = PIL.Image.fromarray(coarse.astype(np.uint8)).resize((width, height))
                # Orientation, transparency and compression are what the originals read in their own way.
                exif = PIL.Image.Exif()
                exif[0x0112] = 6 if index % 2 else 1
                picture.save(tmp_path / part / f"class{label}" / f"{index}.jpg", exif=exif)
    torch.manual_seed(1)
    torch.save(create_backbone(arch, 8).state_dict(), tmp_path / "weights.pth")
    flags = ("--arch", arch, "--patch_size", 8, "--pretrained_weights", tmp_path / "weights.pth")
    plain = ("--data_path", tmp_path, "--image_size", 32, "--num_workers", 0, "--device", "cpu")
    found = printed(knn(*flags, *plain, "--as_stored", "--nb_knn", 1, 10, 20, 200))
    expected = as_dino(arch, tmp_path / "weights.pth", tmp_path, 32, (1, 10, 20, 200))
    assert found == {k: (pytest.approx(top1), pytest.approx(top5)) for k, (top1, top5) in expected.items()}
    upright = printed(knn(*flags, *plain, "--nb_knn", 1, 10, 20, 200))
    assert upright != found


@pytest.mark.slow
def test_accuracies_on_photographs_equal_the_originals_to_the_last_picture(tmp_path, knn, shared_data):
    torch.manual_seed(0)
    torch.save(create_backbone("xcit_pico_3_p8").state_dict(), tmp_path / "weights.pth")
    photos = shared_data / "photos"
    flags = ("--arch", "xcit_pico_3_p8", "--pretrained_weights", tmp_path / "weights.pth")
    found = printed(knn(*flags, "--data_path", photos, "--image_size", 48, "--device", "cpu"))
    # An untrained network's features are so nearly equal that the original's float32 takes neighbours by chance.
    ks = (10, 20, 100, 200)
    expected = as_dino("xcit_pico_3_p8", tmp_path / "weights.pth", photos, 48, ks, dtype=torch.float64)
    assert found == {k: (pytest.approx(top1), pytest.approx(top5)) for k, (top1, top5) in expected.items()}


def test_dumped_features_load_again_and_give_the_same_lines(folder, knn):
    dump = folder / "features"
    on_cpu = ("--device", "cuda", "--use_cuda", "false")
    output = knn(*SMALL, *on_cpu, "--data_path", folder, "--nb_knn", 3, 50, "--dump_features", dump)
    assert "xcit_pico_3_p8: random weights, a baseline (seed 0)" in output
    assert "left out: " in output and "cats/0.png" in output
    assert "--nb_knn 50: there are only 11 training pictures, so all of them vote" in output
    lines = dinos_lines(output)
    assert lines[0].startswith("3-NN classifier result: Top1: ") and lines[0].endswith(", Top5: 100.0")

    features = torch.load(dump / "trainfeat.pth", weights_only=True)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(11))
    assert torch.load(dump / "testlabels.pth", weights_only=True).tolist() == [0, 0, 0, 1, 1, 1]
    assert dinos_lines(knn("--load_features", dump, "--nb_knn", 3, 50)) == lines


def test_loaded_labels_may_be_any_integers(folder, knn):
    dump = folder / "features"
    lines = dinos_lines(knn(*SMALL, "--data_path", folder, "--nb_knn", 3, "--dump_features", dump))
    for name in ("trainlabels.pth", "testlabels.pth"):
        labels = torch.load(dump / name, weights_only=True)
        torch.save(torch.tensor([-1, 10**12])[labels], dump / name)
    output = knn("--load_features", dump, "--nb_knn", 3, "--per_class", "--output_dir", folder / "out")
    assert dinos_lines(output) == lines
    result = json.loads((folder / "out" / "results.json").read_text())["knn"]
    assert list(result["per_class"]) == ["-1", "1000000000000"]
    assert (result["features"], result["loaded_features"]) == ("loaded", str(dump))


def test_results_say_what_they_are_about(folder, knn):
    output = knn(*SMALL, "--data_path", folder, "--nb_knn", 3, "--per_class", "--output_dir", folder / "out")
    result = json.loads((folder / "out" / "results.json").read_text())["knn"]
    assert result["protocol"] == "k-NN, votes weighted by exp(cosine / 0.07)" and result["features"] == "cls"
    (accuracy,) = result["results"]
    assert accuracy["k"] == accuracy["neighbours"] == 3
    assert printed(output)[3][0] == pytest.approx(accuracy["top1"])
    assert np.mean([value["3"] for value in result["per_class"].values()]) == pytest.approx(
        accuracy["balanced"]
    )
    assert f"cats {3:>9} {result['per_class']['cats']['3']:7.2f}" in output
    assert result["pictures"] == {"train": 11, "val": 6} and "0.png" in result["broken"][0]
    assert result["command"].startswith("python command.py --arch xcit_pico_3_p8")
    assert result["seed"] == 0 and result["weights_sha256"] is None and len(result["backbone_sha256"]) == 64
    assert set(result["data_sha256"]) == {"train", "val"} and result["device"].startswith("CPU")
    assert {"torch", "timm", "numpy", "python"} <= result["versions"].keys()


def test_one_set_is_judged_leaving_one_out(folder, knn):
    (folder / "train" / "cats" / "0.png").unlink()
    twin = folder / "train" / "dogs" / "twin.png"
    twin.write_bytes((folder / "train" / "dogs" / "1.png").read_bytes())
    dump = folder / "features"
    output = knn(*SMALL, "--data_path", folder / "train", "--nb_knn", 1, "--dump_features", dump)
    assert "12 pictures of 2 classes, one set: each is judged by all others" in output
    features = torch.load(dump / "trainfeat.pth", weights_only=True).double()
    labels = torch.load(dump / "trainlabels.pth", weights_only=True)
    nearest = (features @ features.T).fill_diagonal_(-2).argmax(dim=1)
    expected = 100 * (labels[nearest] == labels).double().mean().item()
    assert printed(output)[1][0] == pytest.approx(expected)


def test_features_are_reused_and_give_the_same_lines(folder, knn):
    arguments = (*SMALL, "--data_path", folder, "--nb_knn", 3, "--features_dir", folder / "cache")
    first, second = knn(*arguments), knn(*arguments)
    assert "features: reused" not in first
    assert second.count("features: reused from ") == 2
    assert dinos_lines(first) == dinos_lines(second)
    assert second.count("left out: ") == 1


def test_the_mean_of_the_patch_tokens_can_vote(folder, knn):
    knn(*SMALL, "--data_path", folder, "--nb_knn", 3, "--kind", "patch_mean", "--dump_features", "mean")
    knn(*SMALL, "--data_path", folder, "--nb_knn", 3, "--dump_features", "cls")
    mean, cls = (torch.load(f"{name}/testfeat.pth", weights_only=True) for name in ("mean", "cls"))
    assert not torch.allclose(mean, cls, atol=0.1)


def test_val_may_lack_a_class_of_train(folder, knn):
    (folder / "train" / "black").mkdir()
    PIL.Image.new("RGB", (24, 24)).save(folder / "train" / "black" / "0.png")
    output = knn(*SMALL, "--data_path", folder, "--nb_knn", 3, "--dump_features", "features")
    assert "val has no pictures of 1 of train's 3 classes: black" in output
    # Labels count train's classes: black, cats, dogs.
    assert torch.load("features/testlabels.pth", weights_only=True).tolist() == [1, 1, 1, 2, 2, 2]


def test_what_is_missing_or_does_not_fit_is_one_sentence(folder, mistake):
    (folder / "val" / "dogs").rename(folder / "val" / "bright")
    assert "val has 1 of its 2 classes without any in train: bright; both need the same" in mistake(
        *SMALL, "--data_path", folder
    )
    (folder / "trainfeat.pth").write_bytes(b"no tensor")
    assert "trainfeat.pth cannot be read as a tensor; write it again with --dump_features" in mistake(
        "--load_features", folder
    )
    assert "trainfeat.pth is missing; --load_features needs trainfeat.pth, trainlabels.pth" in mistake(
        "--load_features", folder / "nowhere"
    )
    (folder / "file").write_text("mine")
    assert f"cannot write into --dump_features {folder}/file: File exists; name another folder" in mistake(
        *SMALL, "--data_path", folder, "--dump_features", folder / "file"
    )
    assert (folder / "file").read_text() == "mine"
    (folder / "results.json").write_text("[1]")
    assert "is there and is no file of results; name another --output_dir" in mistake("--data_path", folder)


def test_features_of_another_backbone_are_refused(folder, mistake):
    (folder / "dump").mkdir()
    for name, content in {
        "trainfeat": torch.ones(4, 6),
        "trainlabels": torch.tensor([0, 1, 0, 1]),
        "testfeat": torch.ones(2, 8),
        "testlabels": torch.tensor([0, 1]),
    }.items():
        torch.save(content, folder / "dump" / f"{name}.pth")
    assert "the training features are 6 wide and the test features 8: take both from the same backbone" in (
        mistake("--load_features", folder / "dump")
    )
    torch.save(torch.full((2, 6), torch.nan), folder / "dump" / "testfeat.pth")
    assert "the features of 2 pictures are not finite (nan or infinity)" in mistake(
        "--load_features", folder / "dump"
    )


def test_empty_weights_mean_the_published_ones_which_some_have_not(folder, mistake):
    sentence = mistake("--arch", "xcit_nano_12_p16", "--data_path", folder)
    assert (
        "there are no published DINO weights of xcit_nano_12_p16 with patch size 16: name weights" in sentence
    )


def test_what_cannot_vote_is_refused_before_the_work(folder, mistake):
    for flags, sentence in (
        (("--nb_knn", 20, 0), "k must be 1 or more, got 20, 0"),
        (("--temperature", "nan"), "temperature must be above 0 and finite, got nan"),
    ):
        assert sentence in mistake(*SMALL, "--data_path", "/nowhere", *flags)
