import csv
import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from dino.evaluation import eval_linear
from dino.evaluation.linear_classifier import LinearClassifier, classifier_state
from dino.runtime.backbones import create_backbone
from tests.dino.small_runs import rows, write_pictures
from xcit import zoo

SMALL = (
    *("--arch", "xcit_pico_3_p8", "--pretrained_weights", "random", "--image_size", "16"),
    *("--num_workers", "0", "--device", "cpu", "--epochs", "3"),
)
ORIGINAL = (*SMALL, "--protocol", "original", "--batch_size_per_gpu", "5", "--lr", "1")


@pytest.fixture
def folder(tmp_path):
    write_pictures(tmp_path / "train", count=6)
    write_pictures(tmp_path / "val", count=3, seed=1)
    return tmp_path


@pytest.fixture
def linear(call):
    """Runs the command; returns what it prints."""
    return partial(call, eval_linear.main)


@pytest.fixture
def mistake(call):
    """Runs the command with a mistake; returns the sentence."""
    return partial(call, eval_linear.main, code=2)


def results(folder, name):
    return json.loads((folder / "results.json").read_text())[name]


def test_the_fast_protocol_is_the_default_and_one_table_says_what_gave_which_number(folder, linear):
    output = linear(*SMALL, "--data_path", folder, "--shots", 1, 2, "--draws", 3)
    result = results(folder, "linear, fast")
    listed = [(row["protocol"], row["features"]) for row in result["results"]]
    inputs = ("CLS", "CLS + patch mean")
    assert listed == [
        *(("SGD, cached features", name) for name in inputs),
        *(("logistic regression, cached features", name) for name in inputs),
        *(
            (f"logistic regression, cached features, {shots} per class", name)
            for name in inputs
            for shots in (1, 2)
        ),
    ]
    lines = output[output.index("protocol ") :].splitlines()
    for (protocol, features), line, row in zip(listed, lines[1:9], result["results"], strict=True):
        number = f"{row['top1']:.2f}" if "top1" in row else f"{row['mean']:.2f} ± {row['spread']:.2f}"
        assert line.startswith(protocol) and features in line and number in line
    assert result["chosen"]["held_out"] == max(row.get("held_out") or 0 for row in result["results"])
    assert result["classes"] == ["cats", "dogs"] and result["pictures"] == {"train": 12, "val": 6}
    assert (folder / "confusion.png").read_bytes().startswith(b"\x89PNG")
    with (folder / "confusion.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.reader(file))
    assert table[0][1:] == ["cats", "dogs"] and sum(int(cell) for row in table[1:] for cell in row[1:]) == 6


def test_the_last_blocks_of_a_vit_are_inputs_of_their_own(folder, linear):
    linear(*SMALL[2:], "--data_path", folder, "--arch", "vit_tiny", "--patch_size", 8, "--logistic_max", 0)
    listed = [row["features"] for row in results(folder, "linear, fast")["results"]]
    assert listed == ["CLS", "CLS of 4 blocks", "CLS + patch mean", "CLS of 4 blocks + patch mean"]


def test_protocols_of_one_backbone_share_the_table_and_others_do_not_enter_it(folder, linear):
    (folder / "results.json").write_text('{"linear, evaluated": 5}')  # another program's
    linear(*SMALL, "--data_path", folder)
    output = linear(*ORIGINAL, "--data_path", folder)
    table = output[output.index("protocol ") :]
    assert table.count("cached features") == 4 and table.count("random crops") == 1
    assert results(folder, "linear, original")["results"][0]["best_top1"] >= 0
    for other in (("--seed", 1), ("--image_size", 24)):
        assert "random crops" not in linear(*SMALL, "--data_path", folder, *other)


def test_the_original_protocol_resumes_and_its_classifier_is_scored_again(folder, linear):
    output = linear(*ORIGINAL, "--data_path", folder, "--epochs", 2)
    assert "Data loaded with 12 train and 6 val imgs." in output
    assert "Accuracy at epoch 1 of the network on the 6 test images: " in output
    again = linear(*ORIGINAL, "--data_path", folder)
    assert "continuing checkpoint.pth.tar after epoch 2 of 3" in again
    assert [row["epoch"] for row in rows(folder)] == [0, 1, 2]
    top1 = results(folder, "linear, original")["results"][0]["top1"]
    scored = linear(*SMALL, "--data_path", folder, "--evaluate")
    assert f"* Acc@1 {top1:.3f} loss" in scored
    assert f"Accuracy of the network on the 6 test images: {top1:.1f}%" in scored
    assert results(folder, "linear, evaluated")["results"][0]["linear_weights"] == "checkpoint.pth.tar"


def test_half_the_classes_may_be_named_numbers_beyond_the_datas(folder, linear):
    linear(*ORIGINAL, "--data_path", folder, "--num_labels", 7)
    content = torch.load(folder / "checkpoint.pth.tar", weights_only=True)
    assert content["state_dict"]["module.linear.weight"].shape == (7, 96)
    trained = results(folder, "linear, original")["results"][0]
    assert trained["top5"] is not None
    linear(*SMALL, "--data_path", folder, "--evaluate", "--num_labels", 7)
    again = results(folder, "linear, evaluated")["results"][0]
    assert (again["top1"], again["top5"]) == (trained["top1"], trained["top5"])


def test_nothing_is_called_best_where_nothing_could_be_held_out(folder, linear):
    output = linear(*SMALL, "--data_path", folder, "--epochs", 1, "--logistic_max", 0)
    assert "best on the held-out part of train: SGD" in output
    for file in folder.glob("train/*/[1-9].png"):
        file.unlink()
    output = linear(*SMALL, "--data_path", folder, "--epochs", 1, "--logistic_max", 0)
    assert "no class has a second training picture to hold out" in output and "best on" not in output


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A small XCiT with its linear classifier of 1,000 classes, as the authors publish theirs."""
    torch.manual_seed(0)
    backbone = create_backbone("xcit_pico_3_p8")
    classifier = LinearClassifier(96, 1000)
    with torch.no_grad():
        classifier.linear.weight.normal_()
    torch.save(backbone.state_dict(), tmp_path / "pretrain.pth")
    torch.save({"state_dict": classifier_state(classifier), "epoch": 100}, tmp_path / "linearweights.pth")
    weights = zoo.PublishedWeights(
        name="dino_pico",
        architecture="xcit_pico_3_p8",
        url="",
        linear=50.0,
        linear_url=str(tmp_path / "linearweights.pth"),
    )
    monkeypatch.setitem(zoo.DINO, "dino_pico", weights)
    monkeypatch.setattr("xcit.weights.fetch", lambda url: tmp_path / "pretrain.pth")
    monkeypatch.setitem(zoo.PUBLISHED, "dino_pico", weights)
    return backbone.eval(), classifier


@pytest.mark.parametrize("named", [("--arch", "xcit_pico_3_p8"), ("--pretrained_weights", "dino_pico")])
def test_evaluate_scores_the_published_classifier_of_an_xcit(tmp_path, published, linear, named):
    """For which the original silently scores random weights. Few of ImageNet's classes, and no train/."""
    backbone, classifier = published
    images, labels = [], []
    # Their outputs are 0, 1 and 999.
    for output, name in ((0, "n01440764"), (1, "n01443537"), (999, "n15075141")):
        (tmp_path / "data" / "val" / name).mkdir(parents=True)
        for index in range(4):
            pixels = np.random.default_rng(4 * output + index).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((18, 18)).save(tmp_path / "data" / "val" / name / f"{index}.png")
            images.append(Image.open(tmp_path / "data" / "val" / name / f"{index}.png"))
            labels.append(output)
    from dino.evaluation.extraction import Preparation

    with torch.no_grad():
        logits = classifier(
            backbone(torch.stack([Preparation(size=16).transform()(each) for each in images]))
        )
    own = logits.gather(1, torch.tensor(labels)[:, None])
    top5 = 100 * ((logits > own).sum(1) < 5).double().mean().item()
    flags = ("--image_size", 16, "--num_workers", 0, "--device", "cpu")
    output = linear(*named, *flags, "--evaluate", "--data_path", tmp_path / "data")
    assert f"classifier of 1000 classes from {tmp_path / 'linearweights.pth'}" in output
    assert f"Acc@5 {top5:.3f} " in output
    found = results(tmp_path, "linear, evaluated")["results"][0]
    assert found["top1"] == pytest.approx(
        100 * (logits.argmax(1) == torch.tensor(labels)).double().mean().item()
    )


def test_mistakes_are_one_sentence_and_nothing_is_lost(folder, linear, mistake):
    assert "--epochs must be 1 or more" in mistake(*SMALL, "--data_path", folder, "--epochs", 0)
    assert "--shots must be 1 or more" in mistake(*SMALL, "--data_path", folder, "--shots", 1, 0)
    for lr in ("0", "-1", "nan", "inf"):
        assert f"--lr must be above 0 and finite, got {float(lr)}" in mistake(*ORIGINAL, "--lr", lr)
    assert "--num_labels 1: the data has 2 classes; leave it out" in mistake(
        *SMALL, "--data_path", folder, "--num_labels", 1
    )
    assert (
        "needs a trained classifier: there is none published for random, and no checkpoint.pth.tar"
        in mistake(*SMALL, "--data_path", folder, "--evaluate")
    )
    (folder / "checkpoint.pth.tar").write_bytes(b"damaged")
    assert "checkpoint.pth.tar (7 bytes) is not a weights file, or it is damaged" in mistake(
        *ORIGINAL, "--data_path", folder
    )
    assert (folder / "checkpoint.pth.tar").read_bytes() == b"damaged"
    assert "train of one set" not in mistake(*SMALL, "--data_path", folder / "train")
    (folder / "file").write_text("")
    assert f"cannot write into --output_dir {folder}/file/run: Not a directory" in mistake(
        "--output_dir", folder / "file" / "run", "--data_path", folder / "nowhere"
    )
    for file in (folder / "train" / "dogs").iterdir():
        file.unlink()
    assert "the train pictures of" in mistake(*SMALL, "--data_path", folder)
