import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import xcit
from dino.downstream.segmentation.options import SegmentOptions
from dino.downstream.segmentation.task import segment
from dino.runtime.options import UserError
from tests.dino.downstream.segmentation.small_sets import SIZE, halves, write_mask, write_picture, write_set
from tests.two_processes import both_finish
from xcit.segmenter import HEADS

ARCH = "xcit_pico_3_p8"

TINY = {
    "arch": ARCH,
    "scale": (0,),
    "crop": 32,
    "batch_size": 2,
    "iterations": 2,
    "val_every": 2,
    "warmup_iterations": 0,
    "lr": 1e-3,
    "num_workers": 0,
    "device": "cpu",
    "precision": "fp32",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of two steps, and its data."""
    root = tmp_path_factory.mktemp("segment")
    data = write_set(root / "data")
    (data / "classes.txt").write_text("0\tdark\n1\tgrey\n2\tlight\n")
    segment(SegmentOptions(data_path=str(data), output_dir=str(root / "run"), **TINY))
    return root


def options(folder, **changes):
    return SegmentOptions(
        **{**TINY, "data_path": str(folder / "data"), "output_dir": str(folder / "run"), **changes}
    )


def results(folder):
    return json.loads((folder / "results.json").read_text())


def rows(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def test_a_run_leaves_its_network_its_log_and_its_results(trained):
    run = trained / "run"
    assert {"checkpoint.pth", "best_model.pth", "log.txt", "results.json", "curves.png"} <= {
        file.name for file in run.iterdir()
    }
    entry = results(run)["segmentation"]
    assert [row["name"] for row in entry["classes"]] == ["dark", "grey", "light"]
    assert entry["miou"] == pytest.approx(rows(run)[-1]["miou"])
    assert entry["last"]["epoch"] == 0


def test_the_best_network_scores_as_it_did_in_training(trained, tmp_path, capsys):
    weights = str(trained / "run/best_model.pth")
    segment(options(trained, eval=True, weights=weights, arch="auto", output_dir=str(tmp_path)))
    entry = results(tmp_path)["segmentation, evaluated"]
    assert entry["miou"] == pytest.approx(results(trained / "run")["segmentation"]["miou"], abs=1e-6)
    assert "mIoU" in capsys.readouterr().out


def test_scoring_needs_no_train_part_and_no_names(trained, tmp_path):
    write_set(tmp_path / "data", parts=("val",))
    weights = str(trained / "run/best_model.pth")
    segment(options(tmp_path, eval=True, weights=weights, data_path=str(tmp_path / "data"), arch="auto"))
    entry = results(tmp_path / "run")["segmentation, evaluated"]
    assert [row["name"] for row in entry["classes"]] == ["dark", "grey", "light"]


def test_windows_as_large_as_the_pictures_score_as_the_whole(trained, tmp_path):
    scores = []
    for mode in ({"mode": "whole"}, {"mode": "slide", "crop": 64}):
        segment(
            options(
                trained,
                eval=True,
                weights=str(trained / "run/best_model.pth"),
                output_dir=str(tmp_path),
                **mode,
            )
        )
        scores.append(results(tmp_path)["segmentation, evaluated"]["miou"])
    assert scores[0] == pytest.approx(scores[1])


def test_pictures_are_drawn_with_the_classes_of_the_weights(trained, tmp_path, capsys):
    drawn = tmp_path / "drawn"
    write_picture(tmp_path / "in/a.jpg", size=(50, 40))
    write_picture(tmp_path / "in/below/a.png", size=(33, 20))
    (tmp_path / "in/broken.jpg").write_bytes(b"no picture")
    weights = str(trained / "run/best_model.pth")
    segment(
        options(trained, input=(str(tmp_path / "in"),), weights=weights, output_dir=str(drawn), arch="auto")
    )
    assert {file.relative_to(drawn).as_posix() for file in drawn.rglob("*.png")} == {
        *("a_overlay.png", "a_classes.png", "below/a_overlay.png", "below/a_classes.png")
    }
    with Image.open(drawn / "a_classes.png") as ids:
        assert ids.mode == "P" and ids.size == (50, 40)
        assert set(np.unique(np.asarray(ids))) <= {0, 1, 2}
    with Image.open(drawn / "a_overlay.png") as overlay:
        assert overlay.size[0] > 50 and overlay.size[1] >= 40
    said = capsys.readouterr().out
    assert "broken.jpg: not a picture" in said
    assert any(name in said for name in ("dark", "grey", "light"))


def test_what_was_drawn_before_is_no_input(trained, tmp_path):
    write_picture(tmp_path / "a.jpg")
    for _ in range(2):
        segment(
            options(
                trained,
                input=(str(tmp_path / "*"),),
                weights=str(trained / "run/best_model.pth"),
                output_dir=str(tmp_path),
                legend=False,
            )
        )
    assert {file.name for file in tmp_path.iterdir()} == {"a.jpg", "a_overlay.png", "a_classes.png"}
    with Image.open(tmp_path / "a_overlay.png") as overlay:
        assert overlay.size == SIZE


@pytest.mark.slow
def test_a_run_that_was_cut_in_two_equals_one_in_a_piece(trained, tmp_path):
    for name, lengths in (("whole", (4,)), ("parts", (2, 4))):
        for iterations in lengths:
            segment(
                options(
                    trained,
                    output_dir=str(tmp_path / name),
                    iterations=iterations,
                    poly_power=0.0,  # the rate does not depend on the length
                )
            )
    whole, parts = (
        torch.load(tmp_path / name / "checkpoint.pth", weights_only=True)["model"]
        for name in ("whole", "parts")
    )
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_recomputed_activations_change_nothing(trained, tmp_path):
    segment(options(trained, output_dir=str(tmp_path), grad_checkpointing=True))
    expected = rows(trained / "run")[-1]
    assert rows(tmp_path)[-1]["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)
    assert rows(tmp_path)[-1]["miou"] == pytest.approx(expected["miou"], abs=0.5)


@pytest.mark.slow
def test_it_learns_classes_that_the_brightness_tells(trained, tmp_path):
    settings = {"iterations": 30, "val_every": 30, "batch_size": 4, "photometric": False, "lr": 3e-3}
    segment(options(trained, output_dir=str(tmp_path), cat_max_ratio=1.0, ratios=(1.0, 1.0), **settings))
    assert results(tmp_path)["segmentation"]["miou"] > 60


@pytest.mark.slow
def test_upernet_trains_too(trained, tmp_path):
    segment(options(trained, output_dir=str(tmp_path), head="upernet"))
    row = rows(tmp_path)[-1]
    assert row["train_loss"] == pytest.approx(row["train_loss_seg"] + row["train_loss_aux"], rel=1e-5)


_IN_TWO = """
import sys
from dino.downstream.segmentation.options import SegmentOptions
from dino.downstream.segmentation.task import segment
segment(SegmentOptions(data_path=sys.argv[1], output_dir=sys.argv[2], **eval(sys.argv[3])))
import os
print("DONE", os.environ["RANK"])
"""


@pytest.mark.slow
def test_two_processes_train_and_score_as_one(trained, tmp_path):
    both_finish(_IN_TWO, trained / "data", tmp_path / "two", TINY)
    segment(options(trained, output_dir=str(tmp_path / "one")))
    one, two = rows(tmp_path / "one")[-1], rows(tmp_path / "two")[-1]
    assert two["train_loss"] == pytest.approx(one["train_loss"], rel=0.05)
    counted = results(tmp_path / "two")["segmentation"]
    assert sum(row["pixels"] for row in counted["classes"]) == pytest.approx(100, abs=0.01)


def test_broken_masks_are_skipped_and_counted(trained, tmp_path, capsys):
    data = write_set(tmp_path / "data")
    (data / "masks/train/0.png").write_bytes(b"no mask")
    (data / "masks/val/0.png").write_bytes(b"no mask")
    segment(options(tmp_path))
    said = capsys.readouterr().out
    assert "masks/train/0.png" in said and "left out" in said
    assert len(results(tmp_path / "run")["segmentation"]["broken"]) == 1


def test_masks_in_which_nothing_is_judged_leave_the_loss_finite(tmp_path):
    data = write_set(tmp_path / "data")
    for mask in (data / "masks/train").iterdir():
        write_mask(mask, halves(255, 255))
    segment(options(tmp_path))
    row = rows(tmp_path / "run")[-1]
    assert row["train_loss"] == 0 and row["skipped_steps"] == 0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"crop": 100}, "--crop must be a multiple of 32, got 100"),
        ({"stride": 6}, "--stride must be a multiple of 4, got 6"),
        ({"stride": 64}, r"--stride must be at most --crop \(32\), got 64"),
        ({"scale": (5,)}, "--scale must be two sides of 1 or more, or 0, or left out, got 5"),
        ({"ratios": (2.0, 0.5)}, "--ratios must be two rising numbers above 0, got 2.0 0.5"),
        ({"drop_path": 1.0}, r"--drop_path must lie in \[0, 1\), or be -1"),
        ({"ignore": (-1,)}, "--ignore must be numbers of 0 or more"),
        ({"iterations": 0}, "--iterations must be 1 or more"),
        ({"warmup_iterations": 2}, r"--warmup_iterations must be below --iterations \(2\)"),
        ({"data_path": ""}, "--data_path is missing"),
        ({"eval": True, "input": ("a",)}, "ask for one of them"),
        ({"arch": "vit_small"}, "--arch vit_small: segmentation takes XCiTs"),
        ({"batch_size": 5}, "4 pictures do not fill one batch of 5"),
        ({"batch_size": 1, "head": "upernet"}, "UPerNet .* needs 2 or more"),
        ({"weights": "nowhere.pth"}, "--weights: there is no file nowhere.pth"),
        ({"eval": True, "weights": ""}, "there is no best_model.pth in .*: name weights with --weights"),
        ({"input": ("nowhere",), "weights": "nowhere.pth"}, "--weights: there is no file nowhere.pth"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(trained, tmp_path, changes, sentence):
    with pytest.raises(UserError, match=sentence) as refused:
        segment(options(trained, output_dir=str(tmp_path), **changes))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"head": "upernet"}, "holds a Semantic FPN for 3 classes .* and the network is a UPerNet"),
        ({"arch": "xcit_nano_12_p8"}, "on xcit_pico_3_p8, and the network is .* on xcit_nano_12_p8"),
    ],
)
def test_weights_of_another_network_are_refused(trained, tmp_path, changes, sentence):
    weights = str(trained / "run/best_model.pth")
    with pytest.raises(UserError, match=sentence):
        segment(options(trained, weights=weights, output_dir=str(tmp_path), **changes))


def test_a_network_for_another_number_of_classes_cannot_score(trained, tmp_path):
    network = HEADS["fpn"](xcit.create_pyramid(ARCH), 7)
    torch.save({"model": network.state_dict()}, tmp_path / "seven.pth")
    asked = options(trained, eval=True, weights=str(tmp_path / "seven.pth"), output_dir=str(tmp_path))
    with pytest.raises(UserError, match="is for 7 classes, the data has 3"):
        segment(asked)


@pytest.mark.parametrize("wish", [{"eval": True}, {"input": ("a.jpg",)}])
def test_a_backbone_cannot_be_scored_or_draw(trained, tmp_path, wish):
    torch.save(xcit.create_model(ARCH).state_dict(), tmp_path / "backbone.pth")
    asked = options(trained, weights=str(tmp_path / "backbone.pth"), output_dir=str(tmp_path), **wish)
    with pytest.raises(UserError, match="is a backbone, which knows no classes"):
        segment(asked)


def test_data_with_a_number_that_the_network_does_not_know_is_refused(trained, tmp_path):
    data = write_set(tmp_path / "data", parts=("val",), ids=(0, 1, 7))
    asked = options(trained, eval=True, data_path=str(data), output_dir=str(tmp_path / "run"))
    asked = replace(asked, weights=str(trained / "run/best_model.pth"))
    with pytest.raises(UserError, match="has pixels of number 7, which is no class: the classes are 0 to 2"):
        segment(asked)


def test_videos_are_refused_alone_and_left_out_among_pictures(trained, tmp_path, capsys):
    (tmp_path / "clip.mp4").write_bytes(b"video")
    asked = options(trained, input=(str(tmp_path / "clip.mp4"),), output_dir=str(tmp_path / "out"))
    asked = replace(asked, weights=str(trained / "run/best_model.pth"))
    with pytest.raises(UserError, match="pictures are needed, and this is a video"):
        segment(asked)
    write_picture(tmp_path / "a.jpg")
    segment(replace(asked, input=(str(tmp_path),)))
    assert "left out: clip.mp4, a video" in capsys.readouterr().out
