import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import xcit
from dino.downstream.detection.network import open_weights
from dino.downstream.detection.options import DetectOptions, check_detect_options, published_drop_path
from dino.downstream.detection.rates import create_optimizer, create_scheduler
from dino.downstream.detection.task import detect
from dino.downstream.length import Length
from dino.runtime.options import UserError
from tests.dino.downstream.detection.small_coco import write
from tests.two_processes import both_finish
from tests.xcit.test_openmmlab import as_mmdetection
from xcit.detector import MaskRCNN

ARCH = "xcit_pico_3_p8"

TINY: dict[str, Any] = {
    "arch": ARCH,
    "regions": 8,
    "short_sides": (32,),
    "long_side": 64,
    "cut_share": 0.0,
    "test_sides": (32, 64),
    "batch_size": 2,
    "epochs": 1,
    "warmup_iterations": 0,
    "lr": 1e-4,
    "num_workers": 0,
    "device": "cpu",
    "precision": "fp32",
}


def options(root: Path, **changes: Any) -> DetectOptions:
    data = {"data_path": str(root / "pictures"), "annotations": str(root / "annotations.json")}
    return DetectOptions(**{**TINY, **data, "output_dir": str(root / "run"), **changes})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one step, and its data."""
    root = tmp_path_factory.mktemp("detect")
    write(root)
    detect(options(root))
    return root


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


# Options and rates


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (12, (8, 11))),
        ({"schedule": "3x"}, (36, (27, 33))),
        ({"epochs": 24}, (24, (16, 22))),
        ({"epochs": 24, "decay_epochs": (20, 10)}, (24, (10, 20))),
        ({"epochs": 1}, (1, (1, 1))),
    ],
)
def test_a_schedule_can_be_stretched_and_replaced(changes: dict[str, Any], expected: tuple[Any, ...]) -> None:
    assert tuple(DetectOptions(**changes).length) == expected


def test_drop_path_is_that_of_the_published_models() -> None:
    sizes = ("nano_12", "tiny_12", "small_12", "small_24", "medium_24")
    for patch in (8, 16):
        assert [published_drop_path(f"xcit_{size}_p{patch}") for size in sizes] == [0, 0, 0.05, 0.1, 0.15]


def test_the_rate_warms_up_linearly_and_falls_to_a_tenth_after_the_epochs_of_the_schedule() -> None:
    chosen = DetectOptions(lr=1e-4, warmup_iterations=500, warmup_ratio=0.001)
    network = torch.nn.Linear(2, 2)
    optimizer = create_optimizer(chosen, network, torch.device("cpu"))
    scheduler = create_scheduler(chosen, optimizer, Length(16_000, 16, 12_000, 1000))
    found = []
    for step in range(12_000):
        scheduler.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    expected = [
        1e-4
        * (
            0.001 + 0.999 * step / 500
            if step < 500
            else 0.1 ** sum(step >= 1000 * epoch for epoch in (8, 11))
        )
        for step in range(12_000)
    ]
    assert np.allclose(found, expected, rtol=1e-9)


def test_only_norms_have_no_weight_decay() -> None:
    network = MaskRCNN(xcit.create_pyramid(ARCH), 2)
    optimizer = create_optimizer(DetectOptions(), network, torch.device("cpu"))
    decayed = {id(each) for each in optimizer.param_groups[0]["params"]}
    free = {name for name, value in network.named_parameters() if id(value) not in decayed}
    assert free == {name for name, _ in network.named_parameters() if ".norm" in name}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"annotations": ""}, "--annotations is missing"),
        ({"data_path": ""}, "--data_path is missing"),
        ({"eval": True, "input": ("a",)}, "ask for one of them"),
        ({"drop_path": 1.0}, r"--drop_path must lie in \[0, 1\), or be -1"),
        ({"short_sides": ()}, "--short_sides must be one side of 1 or more"),
        ({"cut_sides": (9, 5)}, "--cut_sides must be two rising sides"),
        ({"test_sides": (5,)}, "--test_sides must be two sides of 1 or more, or left out, got 5"),
        ({"score_threshold": 2.0}, r"--score_threshold must lie in \[0, 1\]"),
        ({"regions": 0}, "--regions must be 1 or more"),
        ({"decay_epochs": (0,)}, "--decay_epochs must be numbers of 1 or more"),
        ({"arch": "vit_small"}, "--arch vit_small: detection takes XCiTs"),
        ({"batch_size": 3}, "2 pictures do not fill one batch of 3"),
        ({"weights": "nowhere.pth"}, "--weights: there is no file nowhere.pth"),
        ({"eval": True}, "there is no best_model.pth in .*: name weights with --weights"),
        ({"input": ("nowhere",), "weights": "nowhere.pth"}, "--weights: there is no file nowhere.pth"),
        ({"resume": "nowhere.pth"}, "no checkpoint at nowhere.pth"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    write(tmp_path)
    with pytest.raises(UserError, match=sentence) as refused:
        detect(options(tmp_path, **changes))
    assert "\n" not in str(refused.value)


def test_the_pictures_to_score_may_be_all_that_is_named() -> None:
    check_detect_options(DetectOptions(eval=True, val_annotations="a.json", val_data_path="folder"))
    with pytest.raises(UserError, match="--data_path is missing"):
        check_detect_options(DetectOptions(eval=True, val_annotations="a.json"))


# Runs


@pytest.mark.slow
def test_a_run_leaves_its_network_its_log_and_its_results(trained: Path) -> None:
    run = trained / "run"
    expected = {"checkpoint.pth", "best_model.pth", "log.txt", "results.json", "curves.png"}
    assert expected <= {file.name for file in run.iterdir()}
    (row,) = rows(run)
    losses = ("loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg")
    assert row["train_loss"] == pytest.approx(sum(row[f"train_{name}"] for name in losses), rel=1e-5)
    assert results(run)["detection"]["mask_ap"] == row["mask_ap"]
    assert results(run)["detection"]["pictures"] == 2  # none without objects, as in training


@pytest.mark.slow
def test_the_best_network_scores_as_it_did_in_training(trained: Path, tmp_path: Path) -> None:
    weights = str(trained / "run/best_model.pth")
    found = open_weights(weights)
    assert (found.arch, found.classes.names, found.classes.ids) == (ARCH, ["cat", "dog"], [3, 7])
    assert found.sides == (32, 64)
    again = {"eval": True, "max_pictures": 2, "arch": "auto", "test_sides": ()}
    detect(options(trained, weights=weights, output_dir=str(tmp_path), **again))
    scored = results(tmp_path)["detection, evaluated"]
    assert scored["arch"] == ARCH and scored["pictures"] == 2
    assert scored["box_ap"] == pytest.approx(results(trained / "run")["detection"]["box_ap"])


@pytest.mark.slow
def test_a_run_that_was_cut_in_two_equals_one_in_a_piece(trained: Path, tmp_path: Path) -> None:
    for name, lengths in (("whole", (2,)), ("parts", (1, 2))):
        for epochs in lengths:
            detect(options(trained, output_dir=str(tmp_path / name), epochs=epochs, decay_epochs=(9,)))
    whole, parts = (
        torch.load(tmp_path / name / "checkpoint.pth", weights_only=True)["model"]
        for name in ("whole", "parts")
    )
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.slow
def test_training_goes_on_from_a_detector_of_mmdetection_and_keeps_the_order_of_its_classes(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(3)
    network = MaskRCNN(xcit.create_pyramid(ARCH), 2)
    file = tmp_path / "maskrcnn.pth"
    torch.save({"meta": {"CLASSES": ("dog", "cat")}, "state_dict": as_mmdetection(network)}, file)
    detect(options(trained, output_dir=str(tmp_path / "run"), weights=str(file), lr=0.0, arch="auto"))
    total = len(network.state_dict())
    assert f"{total} of {total} tensors loaded from {file}" in capsys.readouterr().out
    saved = torch.load(tmp_path / "run/best_model.pth", weights_only=True)
    assert saved["detection"]["classes"] == ["dog", "cat"]
    trained_weights = dict(network.named_parameters())
    assert all(torch.equal(saved["model"][name], value) for name, value in trained_weights.items())


def test_the_published_ids_of_coco_have_holes(tmp_path: Path) -> None:
    network = MaskRCNN(xcit.create_pyramid(ARCH), 80)
    torch.save({"state_dict": as_mmdetection(network)}, tmp_path / "coco.pth")
    classes = open_weights(str(tmp_path / "coco.pth")).classes
    assert not classes.certain
    assert (classes.ids[0], classes.ids[11], classes.ids[-1], len(classes.ids)) == (1, 13, 90, 80)


@pytest.mark.slow
def test_a_backbone_goes_into_the_trunk_and_cannot_be_scored_or_draw(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = xcit.create_model(ARCH)
    torch.save(
        {"teacher": {f"backbone.{name}": value for name, value in backbone.state_dict().items()}},
        tmp_path / "b.pth",
    )
    asked = options(trained, weights=str(tmp_path / "b.pth"), output_dir=str(tmp_path / "run"), arch="auto")
    detect(replace(asked, lr=0.0))
    assert "tensors loaded from" in capsys.readouterr().out
    saved = torch.load(tmp_path / "run/best_model.pth", weights_only=True)["model"]
    for name, value in backbone.named_parameters():
        if name.startswith(("blocks", "patch_embed", "pos_embeder")):
            assert torch.equal(saved[f"backbone.pyramid.trunk.{name}"], value)
    for wish in ({"eval": True}, {"input": ("a.jpg",)}):
        with pytest.raises(UserError, match="is a backbone, which knows no classes"):
            detect(replace(asked, **wish))


def of_dogs_and_birds(folder: Path) -> tuple[Path, MaskRCNN]:
    torch.manual_seed(4)
    network = MaskRCNN(xcit.create_pyramid(ARCH), 2)
    file = folder / "maskrcnn.pth"
    torch.save({"meta": {"CLASSES": ("dog", "bird")}, "state_dict": as_mmdetection(network)}, file)
    return file, network


def test_a_network_is_not_scored_on_classes_that_it_does_not_know(tmp_path: Path) -> None:
    write(tmp_path)
    file, _ = of_dogs_and_birds(tmp_path)
    with pytest.raises(UserError, match="has objects of 'cat', which is none of the network's 2 classes"):
        detect(options(tmp_path, weights=str(file), eval=True))


@pytest.mark.slow
def test_for_other_classes_a_detector_keeps_all_but_its_last_layers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path)
    file, network = of_dogs_and_birds(tmp_path)
    detect(options(tmp_path, output_dir=str(tmp_path / "run"), weights=str(file), lr=0.0, arch="auto"))
    assert "with fresh last layers for other classes" in capsys.readouterr().out
    saved = torch.load(tmp_path / "run/best_model.pth", weights_only=True)
    assert "cat" in saved["detection"]["classes"]
    for name, value in network.named_parameters():
        if "predictor" not in name:
            assert torch.equal(saved["model"][name], value), name
    detect(
        options(
            tmp_path,
            output_dir=str(tmp_path / "run"),
            weights=str(tmp_path / "run/best_model.pth"),
            eval=True,
        )
    )


def always_finds(folder: Path, name: str = "always.pth") -> Path:
    """A detector that takes every region for a dog."""
    torch.manual_seed(0)
    network = MaskRCNN(xcit.create_pyramid(ARCH), 2)
    with torch.no_grad():
        network.roi_heads.box_predictor.cls_score.weight.zero_()
        network.roi_heads.box_predictor.cls_score.bias.copy_(torch.tensor([0.0, 3.0, 0.0]))
    facts = {"classes": ["cat", "døg 🐕"], "ids": [3, 7], "sides": [32, 64]}
    torch.save({"model": network.state_dict(), "detection": facts}, folder / name)
    return folder / name


@pytest.mark.slow
def test_objects_are_drawn_and_listed_as_coco_results_with_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in/below").mkdir(parents=True)
    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "in/a.png")
    Image.fromarray(picture[:20]).save(tmp_path / "in/below/a.png")
    (tmp_path / "in/broken.jpg").write_bytes(b"no picture")
    drawn = tmp_path / "drawn"
    asked = DetectOptions(
        input=(str(tmp_path / "in"),),
        weights=str(always_finds(tmp_path)),
        output_dir=str(drawn),
        device="cpu",
    )
    for _ in range(2):
        detect(asked)
    files = {file.relative_to(drawn).as_posix() for file in drawn.rglob("*") if file.is_file()}
    assert files == {"a_objects.png", "below/a_objects.png", "detections.json"}
    with Image.open(drawn / "a_objects.png") as overlay:
        assert overlay.size == (50, 40)
        assert (np.asarray(overlay) != picture).any()
    found = json.loads((drawn / "detections.json").read_text())
    assert {each["file_name"] for each in found} == {"a.png", "below/a.png"}
    assert {(each["category_id"], each["category_name"]) for each in found} == {(7, "døg 🐕")}
    first = found[0]
    assert first["segmentation"]["size"] == [40, 50] and len(first["bbox"]) == 4 and 0.9 < first["score"] < 1
    said = capsys.readouterr().out
    assert "left out: broken.jpg: not a picture" in said and "døg 🐕" in said
    detect(replace(asked, input=(str(drawn), str(tmp_path / "in/a.png")), draw_threshold=1.0))
    with Image.open(drawn / "a_objects.png") as overlay:
        assert np.array_equal(np.asarray(overlay), picture)


@pytest.mark.slow
def test_broken_pictures_are_skipped_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures, _ = write(tmp_path)
    (pictures / "12.png").write_bytes(b"no picture")
    detect(options(tmp_path))
    said = capsys.readouterr().out
    assert "broken picture skipped: 12.png" in said and "left out: 12.png" in said
    entry = results(tmp_path / "run")["detection"]
    assert entry["pictures"] == 1 and len(entry["broken"]) == 1


_IN_TWO = """
import sys
from dino.downstream.detection.options import DetectOptions
from dino.downstream.detection.task import detect
root = sys.argv[1]
detect(DetectOptions(data_path=root + "/pictures", annotations=root + "/annotations.json", output_dir=sys.argv[2],
    **eval(sys.argv[3])))
import os
print("DONE", os.environ["RANK"])
"""


@pytest.mark.slow
def test_two_processes_train_and_score_as_one(trained: Path, tmp_path: Path) -> None:
    both_finish(_IN_TWO, trained, tmp_path / "two", TINY)
    (row,) = rows(tmp_path / "two")
    (alone,) = rows(trained / "run")
    assert row["train_loss"] == pytest.approx(alone["train_loss"], rel=0.2)  # other regions are drawn
    assert results(tmp_path / "two")["detection"]["pictures"] == 2


@pytest.mark.slow
def test_what_is_seen_again_and_again_is_learned(tmp_path: Path) -> None:
    write(tmp_path)
    detect(options(tmp_path, epochs=6, batch_size=1, decay_epochs=(99,), val_every=6, lr=3e-4, clip_grad=5.0))
    first, *_, last = rows(tmp_path / "run")
    assert last["train_loss"] < 0.7 * first["train_loss"]
