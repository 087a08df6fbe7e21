import itertools
import math

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import roi_align

import xcit
from tests.xcit.test_openmmlab import detector
from xcit.detector import Anchors, MaskRCNN, paste_mask
from xcit.detector_heads import PooledRegions, level_of, mask_loss, mask_targets
from xcit.zoo import ARCHITECTURES

PUBLISHED = [
    f"xcit_{size}_p{patch}" for size in ("tiny_12", "small_12", "small_24", "medium_24") for patch in (16, 8)
]
COCO_CLASSES = 80


# Parameters


def of_trunk(width: int, depth: int, heads: int, patch_size: int) -> int:
    widths = [3, *(width // part for part in ((8, 4, 2, 1) if patch_size == 16 else (4, 2, 1)))]
    embedding = sum(9 * a * b + 2 * b for a, b in itertools.pairwise(widths))
    attention = 3 * width**2 + 3 * width + width**2 + width + heads
    local = 2 * (9 * width + width) + 2 * width
    mlp = 8 * width**2 + 5 * width
    norms_and_scales = 3 * 2 * width + 3 * width
    return embedding + 64 * width + width + depth * (attention + local + mlp + norms_and_scales)


def of_mask_rcnn(width: int, depth: int, heads: int, patch_size: int, classes: int) -> int:
    transposed = 4 * width**2 + width
    pyramid = 3 * transposed + 2 * width if patch_size == 16 else transposed
    conv3 = 9 * 256**2 + 256
    neck = 4 * (256 * width + 256) + 4 * conv3
    proposals = conv3 + (3 * 256 + 3) + (12 * 256 + 12)
    boxes = (256 * 49 * 1024 + 1024) + (1024**2 + 1024) + 1025 * (classes + 1) + 1025 * 4 * classes
    masks = 4 * conv3 + (4 * 256**2 + 256) + 257 * classes
    return of_trunk(width, depth, heads, patch_size) + pyramid + neck + proposals + boxes + masks


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_published_configuration(name: str) -> None:
    each = ARCHITECTURES[name]
    with torch.device("meta"):
        model = MaskRCNN(xcit.create_pyramid(name), COCO_CLASSES)
    expected = of_mask_rcnn(each.embed_dim, each.depth, each.num_heads, each.patch_size, COCO_CLASSES)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


# Anchors, levels, regions


def test_anchors_are_centred_on_multiples_of_the_stride_and_not_rounded() -> None:
    # Padded to 96 x 160, the fifth level has 2 x 3 points, 64 pixels apart.
    shapes = [(24, 40), (12, 20), (6, 10), (3, 5), (2, 3)]
    maps = [torch.zeros(2, 1, *shape) for shape in shapes]
    (found, other) = Anchors()(ImageList(torch.zeros(2, 3, 96, 160), [(90, 150), (96, 160)]), maps)
    assert torch.equal(found, other)
    expected = []
    for (rows, cols), stride in zip(shapes, (4, 8, 16, 32, 64), strict=True):
        for row in range(rows):
            for col in range(cols):
                for ratio in (0.5, 1.0, 2.0):
                    height, width = 8 * stride * math.sqrt(ratio), 8 * stride / math.sqrt(ratio)
                    x, y = col * stride, row * stride
                    expected.append([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
    assert torch.allclose(found, torch.tensor(expected), atol=1e-3)


@pytest.mark.parametrize("size", [(64, 64), (96, 160), (32, 224)])
def test_there_are_as_many_anchors_as_scores_at_any_padded_size(size: tuple[int, int]) -> None:
    model = detector(short_side=min(size), long_side=max(size))
    with torch.no_grad():
        maps = list(model.backbone(torch.rand(1, 3, *size)).values())
        scores, _ = model.rpn.head(maps)
    anchors = Anchors()(ImageList(torch.zeros(1, 3, *size), [size]), maps)
    assert len(anchors[0]) == sum(each.numel() for each in scores)


@pytest.mark.parametrize(
    ("width", "height", "level"),
    [
        *((10, 10, 0), (56, 56, 0), (111.9, 111.9, 0), (112, 112, 1), (223, 223, 1), (224, 224, 2)),
        *((448, 448, 3), (5000, 4000, 3), (4 * 112, 28, 1), (0, 50, 0)),
    ],
)
def test_regions_of_twice_the_side_are_pooled_one_level_higher(
    width: float, height: float, level: int
) -> None:
    assert int(level_of(torch.tensor([[7.0, 9.0, 7.0 + width, 9.0 + height]]))) == level


def test_a_pooled_coordinate_is_that_of_the_middle_of_its_bin() -> None:
    """Of a map that holds at each cell the x of its centre: what half a pixel of misalignment would shift."""
    maps = {
        str(level): ((torch.arange(512 // stride) + 0.5) * stride).repeat(512 // stride, 1)[None, None]
        for level, stride in enumerate((4, 8, 16, 32))
    }
    boxes = torch.tensor(
        [[20.0, 30.0, 55.0, 80.0], [60.5, 40.25, 260.5, 140.0], [100.0, 100.0, 450.0, 400.0]]
    )
    pooled = PooledRegions(7)(maps, [boxes], [(512, 512)])
    for values, (x0, _, x1, _) in zip(pooled[:, 0], boxes.tolist(), strict=True):
        middles = x0 + (torch.arange(7) + 0.5) * (x1 - x0) / 7
        assert torch.allclose(values, middles.repeat(7, 1), atol=0.01)


def test_regions_of_several_pictures_and_levels_keep_their_order() -> None:
    torch.manual_seed(0)
    maps = {
        str(level): torch.randn(2, 3, 256 // stride, 256 // stride)
        for level, stride in enumerate((4, 8, 16, 32))
    }
    corners = torch.rand(2, 9, 2) * 100
    boxes = [
        torch.cat([each, each + 4 + torch.rand(9, 2) * 3 ** (1 + torch.arange(9)[:, None] / 2)], 1)
        for each in corners
    ]
    pooled = PooledRegions(14)(maps, boxes, [(256, 256)] * 2)
    place = 0
    for picture in range(2):
        for box in boxes[picture]:
            level = int(level_of(box[None]))
            alone = roi_align(
                maps[str(level)][picture][None], [box[None]], 14, 1 / 2 ** (level + 2), 0, aligned=True
            )
            assert torch.equal(pooled[place], alone[0])
            place += 1


# Masks


def naive_mask(probabilities: Tensor, box: list[float], height: int, width: int) -> Tensor:
    """Every pixel by itself: the bilinear mean of the four nearest of the map's centres, zero outside it."""
    x0, y0, x1, y1 = box
    rows, cols = probabilities.shape
    mask = torch.zeros(height, width, dtype=torch.bool)
    for row in range(height):
        for col in range(width):
            x = (col + 0.5 - x0) / (x1 - x0) * cols - 0.5
            y = (row + 0.5 - y0) / (y1 - y0) * rows - 0.5
            value = 0.0
            for i in (math.floor(y), math.floor(y) + 1):
                for j in (math.floor(x), math.floor(x) + 1):
                    if 0 <= i < rows and 0 <= j < cols:
                        value += float(probabilities[i, j]) * (1 - abs(y - i)) * (1 - abs(x - j))
            mask[row, col] = value >= 0.5
    return mask


@pytest.mark.parametrize(
    "box",
    [
        [5.3, 4.1, 30.7, 22.9],
        [-8.0, -3.5, 20.0, 12.0],
        [20.2, 10.0, 60.0, 50.0],
        [10.0, 10.0, 11.5, 28.0],
        [0.0, 0.0, 40.0, 30.0],
    ],
)
def test_a_pasted_mask_is_that_of_a_naive_bilinear_loop(box: list[float]) -> None:
    torch.manual_seed(0)
    probabilities = torch.nn.functional.interpolate(torch.rand(1, 1, 7, 7), size=28, mode="bilinear")[0, 0]
    pasted = paste_mask(probabilities, torch.tensor(box), 30, 40)
    assert pasted.dtype == torch.bool and pasted.shape == (30, 40)
    assert 0 < pasted.sum() < pasted.numel()
    assert torch.equal(pasted, naive_mask(probabilities, box, 30, 40))


@pytest.mark.parametrize("box", [[5.0, 5.0, 5.0, 9.0], [50.0, 5.0, 60.0, 9.0], [-9.0, -9.0, -1.0, -1.0]])
def test_a_box_without_area_or_outside_has_an_empty_mask(box: list[float]) -> None:
    assert not paste_mask(torch.ones(28, 28), torch.tensor(box), 30, 40).any()


def test_a_full_map_fills_its_box() -> None:
    mask = paste_mask(torch.ones(28, 28), torch.tensor([10.0, 5.0, 20.0, 15.0]), 30, 40)
    assert mask[5:15, 10:20].all() and mask.sum() == 100


def test_a_masks_target_pasted_back_is_the_mask_even_of_a_small_object() -> None:
    for box in ([3.0, 4.0, 9.0, 7.0], [2.0, 1.0, 30.0, 25.0], [10.0, 10.0, 11.0, 19.0]):
        x0, y0, x1, y1 = map(int, box)
        mask = torch.zeros(1, 30, 40, dtype=torch.uint8)
        mask[0, y0:y1, x0:x1] = 1
        # A region beside it, of which it fills a part.
        region = torch.tensor([[box[0] - 1, box[1] - 1, box[2] + 2, box[3] + 1]])
        wanted = mask_targets(mask, region, torch.tensor([0]), 28)
        assert torch.equal(paste_mask(wanted[0], region[0], 30, 40), mask[0].bool())


def test_the_mask_loss_is_the_mean_cross_entropy_of_each_regions_own_class() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 4, 28, 28), torch.tensor([2, 0, 3])
    masks = [
        torch.randint(0, 2, (2, 20, 20)),
        torch.zeros(0, 20, 20, dtype=torch.long),
        torch.ones(1, 20, 20),
    ]
    regions = [
        torch.tensor([[2.0, 3.0, 9.0, 12.0], [5.0, 5.0, 15.0, 18.0]]),
        torch.zeros(0, 4),
        torch.tensor([[1.0, 1.0, 9.0, 9.0]]),
    ]
    objects = [torch.tensor([1, 0]), torch.zeros(0, dtype=torch.long), torch.tensor([0])]
    wanted = [mask_targets(masks[0], regions[0], objects[0], 28)[number] for number in (0, 1)] + [
        torch.ones(28, 28)
    ]
    expected = 0.0
    for own, label, target in zip(logits, labels, wanted, strict=True):
        certain = own[label].sigmoid()
        expected -= (target * certain.log() + (1 - target) * (1 - certain).log()).mean() / 3
    assert torch.allclose(
        mask_loss(logits, labels, masks, regions, objects), torch.as_tensor(expected), atol=1e-5
    )


# The whole network


@pytest.mark.slow
def test_boxes_are_in_the_pixels_of_the_picture_and_masks_stay_small() -> None:
    torch.manual_seed(1)
    picture = torch.rand(3, 48, 80)
    model = detector(telling=True, short_side=96, long_side=400, score_threshold=0.01)
    enlarged = torch.nn.functional.interpolate(picture[None], scale_factor=2, mode="bilinear")[0]
    with torch.no_grad():
        found, expected = model([picture, enlarged])
    assert len(found["scores"]) > 10
    assert found["masks"].shape == (len(found["scores"]), 28, 28)
    assert found["scores"].diff().max() <= 0
    # Resized by the network or before, rounding differs, and near the threshold what is suppressed.
    twice = found["boxes"] * 2
    nearest = (twice[:, None] - expected["boxes"]).abs().amax(dim=2).amin(dim=1)
    assert (nearest < 0.1).float().mean() > 0.95
    assert found["boxes"].min() >= 0 and (found["boxes"].amax(dim=0) <= torch.tensor([80, 48, 80, 48])).all()


@pytest.mark.slow
def test_labels_count_from_0_and_the_last_output_is_the_background() -> None:
    model = detector(score_threshold=0.5, short_side=32, detections=5)
    predictor = model.roi_heads.box_predictor
    picture = torch.rand(3, 32, 32)
    for output in (0, 3, 5):
        with torch.no_grad():
            predictor.cls_score.weight.zero_()
            predictor.cls_score.bias.zero_()
            predictor.cls_score.bias[output] = 10.0
            found = model([picture])[0]
        assert set(found["labels"].tolist()) == (set() if output == 5 else {output})


@pytest.mark.parametrize("size", [(1, 1), (10, 400)])
def test_pictures_of_any_size_are_taken(size: tuple[int, int]) -> None:
    model = detector(short_side=32, long_side=128, score_threshold=0.0, detections=5)
    with torch.no_grad():
        found = model([torch.rand(3, *size)])[0]
    assert (found["boxes"] <= torch.tensor([size[1], size[0]] * 2)).all()


def targets(*boxes: list[float], size: tuple[int, int] = (64, 96)) -> dict[str, Tensor]:
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[int(y0) : int(y1), int(x0) : int(x1)] = 1
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.arange(len(boxes)) % 5,
        "masks": masks,
    }


@pytest.mark.slow
def test_the_losses_reach_every_parameter() -> None:
    model = detector(regions=32).train()
    pictures = [torch.rand(3, 64, 96), torch.rand(3, 64, 96)]
    losses = model(pictures, [targets([10, 10, 50, 40], [5, 30, 20, 60]), targets([0, 0, 90, 60])])
    assert set(losses) == {
        "loss_classifier",
        "loss_box_reg",
        "loss_mask",
        "loss_objectness",
        "loss_rpn_box_reg",
    }
    torch.stack(list(losses.values())).sum().backward()
    without = [name for name, value in model.named_parameters() if value.grad is None]
    assert not without
    assert all(value.grad.isfinite().all() for value in model.parameters())


@pytest.mark.slow
def test_pictures_without_objects_are_trained_on() -> None:
    model = detector(regions=16).train()
    losses = model([torch.rand(3, 64, 96)] * 2, [targets(), targets()])
    assert all(value.isfinite() for value in losses.values())
    losses = model([torch.rand(3, 64, 96)] * 2, [targets(), targets([10, 10, 50, 40])])
    assert all(value.isfinite() for value in losses.values())
    assert losses["loss_mask"] > 0


def test_targets_are_left_as_they_were() -> None:
    model = detector(regions=16).train()
    given = targets([10, 10, 50, 40])
    model([torch.rand(3, 64, 96)], [given])
    assert given["labels"].tolist() == [0] and given["boxes"].tolist() == [[10, 10, 50, 40]]


@pytest.mark.slow
def test_in_bfloat16_coordinates_and_scores_are_float32() -> None:
    torch.manual_seed(0)
    model = detector(telling=True, short_side=64, long_side=96, score_threshold=0.01)
    picture = torch.rand(3, 64, 96)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = model([picture])[0]
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32
    # Of so many boxes some would fall on whole pixels, were they rounded to the eight bits of bfloat16.
    assert (found["boxes"].bfloat16().float() != found["boxes"]).float().mean() > 0.5
