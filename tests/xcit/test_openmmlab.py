import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import xcit
from tests.xcit.naive_mask_rcnn import detections
from xcit.detector import MaskRCNN
from xcit.openmmlab import is_detector, load_detector, read_network, trunk_of
from xcit.weights import WeightsError, architecture_of

CLASSES = 5


def detector(seed: int = 0, *, telling: bool = False, **options: float) -> MaskRCNN:
    """Random in every tensor, so that no two parts can be exchanged unnoticed.

    Args:
        telling: its scores differ more from region to region than they have in common, which takes a while.
    """
    torch.manual_seed(seed)
    model = MaskRCNN(xcit.create_pyramid("xcit_pico_3_p8"), CLASSES, **options)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 1:
                is_scale = name.endswith("weight") or "gamma" in name
                value.copy_(torch.rand_like(value) * 0.5 + (0.75 if is_scale else -0.25))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.2, 0.2)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
        heads, predictor = model.rpn.head, model.roi_heads.box_predictor
        of_last = ((predictor.cls_score, 1.0), (predictor.bbox_pred, 0.1), (heads.cls_logits, 0.2))
        for layer, spread in (*of_last, (heads.bbox_pred, 0.03)):
            nn.init.normal_(layer.weight, std=spread)
            layer.weight -= layer.weight.flatten(1).mean(dim=1).view(-1, *[1] * (layer.weight.ndim - 1))
        if telling:
            hidden: list[Tensor] = []
            hook = model.roi_heads.box_head.register_forward_hook(lambda *parts: hidden.append(parts[-1]))
            model.eval()([torch.rand(3, 64, 96)])
            hook.remove()
            predictor.cls_score.bias -= predictor.cls_score(hidden[0]).mean(dim=0)
    return model.eval()


# What stands where in mmdetection's names, and what its model calls that here.
FIXED = {
    "rpn_head.rpn_conv": "rpn.head.conv.0.0",
    "rpn_head.rpn_cls": "rpn.head.cls_logits",
    "rpn_head.rpn_reg": "rpn.head.bbox_pred",
    "roi_head.bbox_head.shared_fcs.0": "roi_heads.box_head.fc6",
    "roi_head.bbox_head.shared_fcs.1": "roi_heads.box_head.fc7",
    "roi_head.bbox_head.fc_cls": "roi_heads.box_predictor.cls_score",
    "roi_head.bbox_head.fc_reg": "roi_heads.box_predictor.bbox_pred",
    "roi_head.mask_head.upsample": "roi_heads.mask_head.upsampling",
    "roi_head.mask_head.conv_logits": "roi_heads.mask_predictor.mask_fcn_logits",
    **{f"roi_head.mask_head.convs.{i}.conv": f"roi_heads.mask_head.convolutions.{i}" for i in range(4)},
    **{f"neck.lateral_convs.{i}.conv": f"backbone.fpn.inner_blocks.{i}.0" for i in range(4)},
    **{f"neck.fpn_convs.{i}.conv": f"backbone.fpn.layer_blocks.{i}.0" for i in range(4)},
}


def as_mmdetection(model: MaskRCNN) -> dict[str, Tensor]:
    theirs = {ours: name for name, ours in FIXED.items()}
    state = {}
    for name, value in model.state_dict().items():
        module, _, last = name.rpartition(".")
        if module in theirs:
            name = f"{theirs[module]}.{last}"
        else:
            name = re.sub(r"^backbone\.pyramid\.(trunk\.)?", "backbone.", name)
        state[name] = value.clone()
    return state


@pytest.fixture(scope="module")
def picture() -> Tensor:
    torch.manual_seed(3)
    coarse = torch.rand(1, 3, 5, 6)
    return F.interpolate(coarse, size=(90, 120), mode="bicubic")[0].clamp(0, 1)


@pytest.mark.slow
def test_a_file_of_mmdetection_gives_the_detections_of_the_model_it_was_made_from(
    tmp_path: Path, picture: Tensor
) -> None:
    sides = {"short_side": 64, "long_side": 128, "score_threshold": 0.01}
    published = detector(seed=0, telling=True, **sides)
    file = tmp_path / "maskrcnn_xcit.pth"
    torch.save({"meta": {"CLASSES": ("a", "b"), "epoch": 36}, "state_dict": as_mmdetection(published)}, file)
    ours = detector(seed=1, **sides)
    report = load_detector(ours, file)
    assert report.matched == report.total == len(ours.state_dict())
    assert str(file) == report.source and report.sha256
    with torch.no_grad():
        expected, found = published([picture])[0], ours([picture])[0]
    assert len(expected["scores"]) > 10
    for name, values in expected.items():
        assert torch.equal(found[name], values), name


@pytest.mark.slow
def test_detections_are_those_of_a_naive_mask_rcnn_with_the_background_last() -> None:
    size = (90, 120)
    model = detector(telling=True, short_side=min(size), long_side=max(size), score_threshold=0.01)
    torch.manual_seed(5)
    picture = torch.rand(3, *size)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = (picture - mean[:, None, None]) / std[:, None, None]
    padded = torch.zeros(1, 3, 96, 128)
    padded[0, :, : size[0], : size[1]] = normalised
    with torch.no_grad():
        found = model([picture])[0]
        maps = model.backbone.pyramid(padded)
        expected = detections(as_mmdetection(model), maps, size, threshold=0.01)
    assert len(expected.scores) > 10
    assert len(expected.labels.unique()) > 1
    assert torch.allclose(found["scores"], expected.scores, atol=1e-4)
    # Equal scores may stand in either order.
    for box, label, score, mask in zip(
        *(found[n] for n in ("boxes", "labels", "scores", "masks")), strict=True
    ):
        distance = (expected.boxes - box).abs().amax(dim=1) + 1e3 * (expected.labels != label)
        nearest = int(distance.argmin())
        assert distance[nearest] < 0.05
        assert abs(expected.scores[nearest] - score) < 1e-3
        assert (expected.masks[nearest] - mask).abs().max() < 0.02


def test_our_own_checkpoint_loads_too(tmp_path: Path) -> None:
    trained, fresh = detector(seed=0), detector(seed=1)
    torch.save({"model": trained.state_dict(), "epoch": 3, "optimizer": {}}, tmp_path / "checkpoint.pth")
    load_detector(fresh, tmp_path / "checkpoint.pth")
    for name, value in trained.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name


def test_wrapped_networks_and_files_without_counters_load() -> None:
    state = {
        f"module.{name}": value
        for name, value in as_mmdetection(detector(seed=0)).items()
        if not name.endswith("num_batches_tracked")
    }
    fresh = detector(seed=1)
    load_detector(fresh, {"state_dict": state})
    trained = detector(seed=0).state_dict()
    assert all(
        torch.equal(value, fresh.state_dict()[name]) for name, value in trained.items() if "num_b" not in name
    )


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda state: state.pop("neck.fpn_convs.2.conv.bias"), id="missing"),
        pytest.param(lambda state: state.update({"roi_head.extra": torch.zeros(1)}), id="left over"),
        pytest.param(
            lambda state: state.update({"roi_head.bbox_head.fc_cls.bias": torch.zeros(3)}), id="shape"
        ),
    ],
)
def test_less_or_more_or_other_than_the_network_is_refused_and_changes_nothing(change) -> None:
    state = as_mmdetection(detector(seed=0))
    change(state)
    model = detector(seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(WeightsError, match=r"does not fit the network's .* tensors: 1 "):
        load_detector(model, {"state_dict": state})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "meta": {}}, tmp_path / "empty.pth")
    with pytest.raises(WeightsError, match="holds no tensors"):
        load_detector(detector(), tmp_path / "empty.pth")


def test_both_layouts_tell_their_architecture_and_that_they_are_detectors() -> None:
    model = detector()
    for content in ({"state_dict": as_mmdetection(model)}, {"model": model.state_dict()}):
        state, _ = read_network(content)
        assert is_detector(state)
        assert architecture_of(trunk_of(state)) == "xcit_pico_3_p8"
    assert not is_detector(xcit.create_model("xcit_pico_3_p8").state_dict())
