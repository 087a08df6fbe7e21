import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets, transforms

import xcit
from dino.evaluation import verify
from dino.evaluation.imagenet import what_is_missing
from dino.evaluation.linear_classifier import LinearClassifier, classifier_state
from dino.runtime.backbones import create_backbone
from xcit import zoo

NORMALISE = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Of ImageNet's 1,000 classes: outputs 0, 1 and 999.
CLASSES = {"n01440764": 0, "n01443537": 1, "n15075141": 999}


@pytest.fixture
def imagenet(tmp_path):
    """A few pictures in ImageNet's layout."""
    for part, count in (("train", 8), ("val", 4)):
        for name, output in CLASSES.items():
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(count):
                noise = np.random.default_rng((output, index, len(part)))
                pixels = noise.integers(0, 160, (4, 4, 3)) + np.array([0, 30, 60]) * (output % 3)
                picture = Image.fromarray(pixels.astype(np.uint8)).resize((300, 260))
                picture.save(tmp_path / part / name / f"{index}.jpg")
    return tmp_path


@pytest.fixture
def publish(monkeypatch, tmp_path):
    """Puts weights among the published ones, and their files where downloads are kept."""
    files = {}
    monkeypatch.setattr("xcit.weights.fetch", lambda url: files[url])

    def put(table, weights, **contents):
        monkeypatch.setitem(table, weights.name, weights)
        monkeypatch.setitem(zoo.PUBLISHED, weights.name, weights)
        for kind, content in contents.items():
            torch.save(content, tmp_path / f"{kind}.pth")
            files[getattr(weights, kind)] = tmp_path / f"{kind}.pth"

    return put


@pytest.fixture
def run(call):
    return partial(call, verify.main)


ON_CPU = ("--device", "cpu", "--num_workers", 0)


def top1(folder, transform, logits_of):
    pictures = datasets.ImageFolder(str(folder), transform)
    outputs = [CLASSES[name] for name in pictures.classes]
    with torch.no_grad():
        right = [logits_of(image[None]).argmax().item() == outputs[label] for image, label in pictures]
    return 100 * float(np.mean(right))


def test_supervised_top1_is_measured_on_full_crops_with_the_models_own_head(
    imagenet, publish, run, monkeypatch
):
    torch.manual_seed(0)
    model = xcit.create_model("xcit_pico_3_p8", num_classes=1000).eval()
    with torch.no_grad():
        model.head.weight.normal_()
        model.head.bias[list(CLASSES.values())] += 25  # so that some are right
    full_crop = [
        transforms.Resize(32, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(32),
    ]
    expected = top1(
        imagenet / "val", transforms.Compose([*full_crop, transforms.ToTensor(), NORMALISE]), model
    )
    assert 0 < expected < 100
    weights = zoo.PublishedWeights(
        "xcit_pico_32", "xcit_pico_3_p8", "url of pico", input_size=32, top1=expected + 0.1
    )
    publish(zoo.SUPERVISED, weights, url={"model": model.state_dict()})
    output = run("xcit_pico_32", "--data_path", imagenet, *ON_CPU)
    line = next(line for line in output.splitlines() if line.startswith("supervised top-1"))
    assert line.split()[2:] == [
        f"{expected + 0.1:.2f}",
        f"{expected:.2f}",
        "-0.10",
        "pass",
        "(tolerance",
        "0.15)",
    ]
    short = "3 of 1,000 classes, 12 of 50,000 val pictures"
    assert f"this proves nothing: the data is not ImageNet-1k, with {short}" in output
    result = json.loads((imagenet / "results.json").read_text())["verify xcit_pico_32"]
    assert result["proves_nothing"] == short and result["results"][0]["pass"] is True
    assert len(result["data_sha256"]["val"]) == 64
    assert result["preprocessing"]["size"] == 32 and len(result["weights_sha256"]) == 64
    assert "fail" in run("xcit_pico_32", "--data_path", imagenet, *ON_CPU, "--tolerance", 0.05)

    monkeypatch.setattr(verify, "_missing", lambda *_: None)  # as if it were all of ImageNet
    sentence = run("xcit_pico_32", "--data_path", imagenet, *ON_CPU, "--tolerance", 0.05, code=1)
    assert "not reproduced: xcit_pico_32, supervised top-1" in sentence


def test_k_nn_and_the_published_classifier_are_measured_for_self_supervised_weights(imagenet, publish, run):
    torch.manual_seed(0)
    backbone, classifier = create_backbone("xcit_pico_3_p8").eval(), LinearClassifier(96, 1000)
    with torch.no_grad():
        classifier.linear.weight.normal_()
        classifier.linear.bias[list(CLASSES.values())] += 25
    weights = zoo.PublishedWeights(
        name="dino_pico",
        architecture="xcit_pico_3_p8",
        url="url of pico",
        knn=76.0,
        linear=77.8,
        linear_url="https://nowhere/linear",
    )
    publish(
        zoo.DINO,
        weights,
        url=backbone.state_dict(),
        linear_url={"state_dict": classifier_state(classifier)},
    )
    resize = [
        transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(224),
    ]
    transform = transforms.Compose([*resize, transforms.ToTensor(), NORMALISE])
    expected = top1(imagenet / "val", transform, lambda image: classifier(backbone(image)))
    output = run("dino_pico", "--data_path", imagenet, *ON_CPU)
    linear, knn = (
        next(line for line in output.splitlines() if line.startswith(f"{name} ")).split()
        for name in ("linear", "20-NN")
    )
    assert linear[1:3] == ["77.80", f"{expected:.2f}"] and knn[1] == "76.00"
    assert "3 of 1,000 classes, 12 of 50,000 val pictures" in output
    result = json.loads((imagenet / "results.json").read_text())["verify dino_pico"]
    assert result["preprocessing"]["as_stored"] is True and len(result["data_sha256"]["val"]) == 64
    assert [row["measure"] for row in result["results"]] == ["linear", "20-NN"]
    assert "20-NN" not in run("dino_pico", "--data_path", imagenet, *ON_CPU, "--skip_knn")


def test_classes_that_are_not_imagenets_are_numbered_and_said(imagenet, publish, run):
    for part in ("train", "val"):
        for number, name in enumerate(CLASSES):
            (imagenet / part / name).rename(imagenet / part / f"class{number}")
    model = xcit.create_model("xcit_pico_3_p8", num_classes=1000)
    weights = zoo.PublishedWeights("xcit_pico_16", "xcit_pico_3_p8", "url", input_size=16, top1=0.0)
    publish(zoo.SUPERVISED, weights, url={"model": model.state_dict()})
    output = run("xcit_pico_16", "--data_path", imagenet, *ON_CPU)
    assert "the class folders do not bear ImageNet's names" in output and "proves nothing" in output


def test_all_published_numbers_are_measured_one_after_the_other(imagenet, publish, run, monkeypatch):
    assert len(verify._names("supervised")) == 42 and len(verify._names("dino")) == len(zoo.DINO)
    for name in list(zoo.SUPERVISED):
        monkeypatch.delitem(zoo.SUPERVISED, name)
    torch.manual_seed(0)
    model = xcit.create_model("xcit_pico_3_p8", num_classes=1000)
    for name, published in (("first", 0.0), ("second", 100.0)):
        weights = zoo.PublishedWeights(name, "xcit_pico_3_p8", "url", input_size=16, top1=published)
        publish(zoo.SUPERVISED, weights, url={"model": model.state_dict()})
    monkeypatch.setattr(verify, "_missing", lambda *_: None)
    sentence = run("supervised", "--data_path", imagenet, *ON_CPU, code=1)
    assert "not reproduced: second, supervised top-1" in sentence
    results = json.loads((imagenet / "results.json").read_text())
    assert [results[f"verify {name}"]["results"][0]["pass"] for name in ("first", "second")] == [True, False]


def test_an_unknown_name_gets_the_nearest(run, imagenet):
    sentence = run("dino_xcit_smal_12_p16", "--data_path", imagenet, code=2)
    assert "no published weights 'dino_xcit_smal_12_p16'; did you mean dino_xcit_small_12_p16" in sentence


def test_what_is_missing_is_counted():
    assert what_is_missing(1000, 50_000, 1_281_167) is None
    assert what_is_missing(1000, 50_000, 5) == "5 of 1,281,167 training pictures"
    assert what_is_missing(10, 50_000) == "10 of 1,000 classes"


def test_every_published_number_has_a_protocol():
    for weights in zoo.PUBLISHED.values():
        assert (weights.top1 is not None) != (weights.knn is not None and weights.linear is not None)
        assert weights.top1 is not None or weights.linear_url.endswith("_linearweights.pth")
