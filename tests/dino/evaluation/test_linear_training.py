import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision import transforms

import xcit
from dino.evaluation import linear_training
from dino.evaluation.extraction import Extractor, Preparation
from dino.evaluation.linear_classifier import ProbedTokens, classifier_state, load_classifier
from dino.evaluation.linear_training import NAME, LinearTraining, train_classifier
from dino.loader import mixed_seed
from dino.runtime.options import RunStopped, UserError
from dino.runtime.pictures import open_pictures
from tests.dino.small_runs import Killed, rows, write_pictures

FOUR = LinearTraining(epochs=4, lr=5.0, batch_size=5, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("labelled")
    write_pictures(root / "train", count=6)
    write_pictures(root / "val", count=3, seed=1)
    return root


@pytest.fixture(scope="module")
def extractor():
    torch.manual_seed(0)
    return Extractor(xcit.create_model("xcit_pico_3_p8"), Preparation(size=16), batch_size=4)


def train(extractor, data, folder, settings=FOUR, said=None, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    arguments = {"num_classes": 2, "backbone_sha256": "a" * 64, **changes}
    train_pictures, val = (open_pictures(str(data), split=split) for split in ("train", "val"))
    return train_classifier(
        extractor,
        ProbedTokens(),
        train_pictures,
        val,
        np.arange(2),
        settings,
        folder,
        say=(said if said is not None else []).append,
        **arguments,
    )


def naive(extractor, data, settings):
    """The weights after the protocol, from torchvision's folder, its crops, torch's SGD and the cosine's formula."""
    pictures = open_pictures(str(data), split="train")
    crop = transforms.Compose(
        [
            transforms.RandomResizedCrop(16),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    weight = torch.empty(2, 96).normal_(std=0.01, generator=torch.Generator().manual_seed(settings.seed))
    bias, velocity = torch.zeros(2), [torch.zeros(2, 96), torch.zeros(2)]
    extractor.backbone.eval()
    for epoch in range(settings.epochs):
        rate = settings.lr * settings.batch_size / 256 * (1 + math.cos(math.pi * epoch / settings.epochs)) / 2
        order = torch.randperm(
            len(pictures), generator=torch.Generator().manual_seed(settings.seed + epoch)
        ).tolist()  # torch's DistributedSampler
        for start in range(0, len(order), settings.batch_size):
            places = order[start : start + settings.batch_size]
            images = []
            for place in places:
                torch.manual_seed(mixed_seed(settings.seed, epoch, place))
                images.append(crop(pictures.picture(place)))
            with torch.no_grad():
                features = extractor.backbone(torch.stack(images))
            gradient = (features @ weight.T + bias).softmax(1)
            gradient[range(len(places)), [pictures.labels[place] for place in places]] -= 1
            gradient /= len(places)
            for parameter, slope, speed in zip(
                (weight, bias), (gradient.T @ features, gradient.sum(0)), velocity, strict=True
            ):
                speed.mul_(0.9).add_(slope)
                parameter.sub_(rate * speed)
    return weight, bias


def test_training_equals_the_protocol_written_out(extractor, folder, tmp_path):
    train(extractor, folder, tmp_path)
    weight, bias = naive(extractor, folder, FOUR)
    found = torch.load(tmp_path / NAME, weights_only=True)["state_dict"]
    torch.testing.assert_close(found["module.linear.weight"], weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["module.linear.bias"], bias, rtol=1e-4, atol=1e-5)


def test_it_learns_and_leaves_dinos_files(extractor, folder, tmp_path):
    before = [parameter.clone() for parameter in extractor.backbone.parameters()]
    trained = train(extractor, folder, tmp_path, replace(FOUR, epochs=31, lr=40.0, val_freq=20))
    assert trained.last.top1 == trained.best_top1 == 100  # told apart by colour
    log = rows(tmp_path)
    assert [row["epoch"] for row in log] == list(range(31))
    assert [sorted(row) for row in log[:2]] == [
        ["epoch", "test_acc1", "test_loss", "train_loss", "train_lr"],
        ["epoch", "train_loss", "train_lr"],
    ]
    assert [row["epoch"] for row in log if "test_acc1" in row] == [0, 20, 30]
    assert log[0]["train_lr"] == pytest.approx(40 * 5 / 256) and log[-1]["train_loss"] < log[0]["train_loss"]
    content = torch.load(tmp_path / NAME, weights_only=True)
    assert {"epoch", "state_dict", "optimizer", "scheduler", "best_acc"} <= content.keys()
    assert content["epoch"] == 31 and content["best_acc"] == 100
    assert load_classifier(str(tmp_path / NAME), 96).linear.out_features == 2
    assert all(torch.equal(a, b) for a, b in zip(before, extractor.backbone.parameters(), strict=True))


@pytest.mark.parametrize("moment", ["step", "look"])
def test_a_killed_run_ends_as_if_it_had_not_been(extractor, folder, tmp_path, monkeypatch, moment):
    train(extractor, folder, tmp_path / "whole")
    name = {"step": "_step", "look": "score"}[moment]
    function, calls = getattr(linear_training, name), iter(range(7 if moment == "step" else 2))

    def cut(*arguments, **settings):
        if next(calls, None) is None:
            raise Killed
        return function(*arguments, **settings)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(linear_training, name, cut)
        train(extractor, folder, tmp_path / "cut")
    said = []
    train(extractor, folder, tmp_path / "cut", said=said)
    assert re.fullmatch(r"continuing .*checkpoint\.pth\.tar after epoch 2 of 4", said[0])
    whole, cut_off = (torch.load(tmp_path / run / NAME, weights_only=True) for run in ("whole", "cut"))
    assert torch.equal(
        whole["state_dict"]["module.linear.weight"], cut_off["state_dict"]["module.linear.weight"]
    )
    assert str(whole["optimizer"]) == str(cut_off["optimizer"])
    assert rows(tmp_path / "whole") == rows(tmp_path / "cut")


def test_more_epochs_go_on_where_their_schedule_is(extractor, folder, tmp_path):
    train(extractor, folder, tmp_path)
    said = []
    assert train(extractor, folder, tmp_path, said=said).best_top1 >= 50
    assert said[-1] == "nothing to train: all epochs are done; a larger --epochs continues"
    train(extractor, folder, tmp_path, replace(FOUR, epochs=6))
    rates = [row["train_lr"] for row in rows(tmp_path)]
    assert rates[4:] == pytest.approx(
        [5 * 5 / 256 * (1 + math.cos(math.pi * epoch / 6)) / 2 for epoch in (4, 5)]
    )


def test_a_checkpoint_of_the_original_continues(extractor, folder, tmp_path):
    train(extractor, folder, tmp_path, replace(FOUR, epochs=2))
    content = torch.load(tmp_path / NAME, weights_only=True)
    del content["backbone_sha256"]
    torch.save(content, tmp_path / NAME)
    said = []
    train(extractor, folder, tmp_path, said=said)
    assert "after epoch 2 of 4" in said[0]


def test_a_checkpoint_of_another_backbone_other_classes_or_damage_is_refused_and_kept(
    extractor, folder, tmp_path
):
    train(extractor, folder, tmp_path, replace(FOUR, epochs=1))
    before = (tmp_path / NAME).read_bytes()
    others = write_pictures(tmp_path / "data" / "train", classes=("cats", "cows"), count=1).parent
    write_pictures(others / "val", classes=("cats", "cows"), count=1)
    with pytest.raises(
        UserError, match="is for the classes cats, dogs, these pictures have cats, cows; name"
    ):
        train(extractor, others, tmp_path)
    with pytest.raises(
        UserError, match=r"was trained on another backbone \(aaaaaaaa\.\.\., this is bbbbbbbb"
    ):
        train(extractor, folder, tmp_path, backbone_sha256="b" * 64)
    with pytest.raises(UserError, match="is for 2 classes, these pictures ask for 3"):
        train(extractor, folder, tmp_path, num_classes=3)
    assert (tmp_path / NAME).read_bytes() == before
    content = torch.load(tmp_path / NAME, weights_only=True)
    torch.save({"state_dict": content["state_dict"], "epoch": 1}, tmp_path / NAME)
    with pytest.raises(UserError, match=r"lacks what it takes to continue \('best_acc'\); remove it"):
        train(extractor, folder, tmp_path)
    (tmp_path / NAME).write_bytes(before[: len(before) // 2])
    with pytest.raises(UserError, match="is not a weights file, or it is damaged or cut short"):
        train(extractor, folder, tmp_path)


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_epoch(extractor, folder, tmp_path):
    train(extractor, folder, tmp_path, replace(FOUR, epochs=1))
    with pytest.raises(RunStopped, match=r"the loss is (nan|inf): lower --lr; the last whole epoch is kept"):
        train(extractor, folder, tmp_path, replace(FOUR, lr=math.inf))
    assert torch.load(tmp_path / NAME, weights_only=True)["epoch"] == 1


def test_broken_pictures_are_left_out_and_listed(extractor, tmp_path):
    write_pictures(tmp_path / "train", count=3)
    write_pictures(tmp_path / "val", count=2, seed=1)
    (tmp_path / "train" / "cats" / "0.png").write_bytes(b"broken")
    trained = train(extractor, tmp_path, tmp_path / "run", replace(FOUR, batch_size=1))
    assert len(trained.broken) == 1 and "cats/0.png" in trained.broken[0]
    assert all(math.isfinite(row["train_loss"]) for row in rows(tmp_path / "run"))


def test_nothing_is_trained_on_pictures_none_of_which_can_be_read(extractor, tmp_path):
    write_pictures(tmp_path / "train", count=3)
    write_pictures(tmp_path / "val", count=2, seed=1)
    for picture in (tmp_path / "train").rglob("*.png"):
        picture.write_bytes(b"broken")
    with pytest.raises(UserError, match=r"^none of the training pictures can be read; .*cats/0\.png: not a"):
        train(extractor, tmp_path, tmp_path / "run")
    assert not (tmp_path / "run" / NAME).exists()


def test_state_is_named_as_in_dinos_files(extractor, folder, tmp_path):
    train(extractor, folder, tmp_path, replace(FOUR, epochs=1))
    classifier = load_classifier(str(tmp_path / NAME), 96)
    assert classifier_state(classifier).keys() == {"module.linear.weight", "module.linear.bias"}
    assert json.loads((tmp_path / "log.txt").read_text())["epoch"] == 0
