"""Average precision of boxes and masks, as COCO measures it.

measures = score(objects, detections)    # {"box_ap": 41.2, ..., "mask_ap": 37.9, ...}
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dino.downstream.detection.coco import CocoSet, coco_tools, drawn, quiet

# Names of our measures, and their places among those that COCO sums up.
_PLACES = {"ap": 0, "ap50": 1, "ap75": 2, "ap_small": 3, "ap_medium": 4, "ap_large": 5, "ar100": 8}
_KINDS = {"box": "bbox", "mask": "segm"}

MEASURES = tuple(f"{kind}_{name}" for kind in _KINDS for name in _PLACES)


def table(measures: Mapping[str, float]) -> list[str]:
    """Lines for a terminal: boxes and masks below each other."""
    heads = {"ap": "AP", "ap50": "AP50", "ap75": "AP75", "ap_small": "small", "ap_medium": "medium"}
    heads |= {"ap_large": "large", "ar100": "AR100"}
    lines = ["      " + "".join(f"{heads[name]:>8}" for name in _PLACES)]
    for kind in _KINDS:
        values = (measures[f"{kind}_{name}"] for name in _PLACES)
        lines.append(
            f"{kind:<6}" + "".join(f"{value:8.1f}" if value >= 0 else f"{'-':>8}" for value in values)
        )
    return lines


def score(
    truth: CocoSet, detections: Sequence[Mapping[str, Any]], *, pictures: Sequence[int] | None = None
) -> dict[str, float]:
    """Measures in percent by the names in `MEASURES`; -1 where the truth has nothing to measure them by.

    Args:
        detections: COCO results: image_id, category_id, bbox as x, y, width, height, score, segmentation.
        pictures: indices of those that count; None: all.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    coco_tools()
    counted = range(len(truth)) if pictures is None else pictures
    with quiet():
        coco = COCO()
        coco.dataset = _dataset(truth, counted)
        coco.createIndex()
        measures: dict[str, float] = {}
        for kind, name in _KINDS.items():
            found = COCO()
            found.dataset = {**coco.dataset, "annotations": _annotations(detections, kind)}
            found.createIndex()
            judge = COCOeval(coco, found, name)
            judge.evaluate()
            judge.accumulate()
            judge.summarize()
            measures |= {
                f"{kind}_{each}": _percent(float(judge.stats[place])) for each, place in _PLACES.items()
            }
    return measures


def _dataset(truth: CocoSet, counted: Sequence[int]) -> dict[str, Any]:
    """As COCO's evaluation wants it. Ids count from 1: it takes 0 for no object at all."""
    objects: list[dict[str, Any]] = []
    for index in counted:
        for each in truth.annotations[index]:
            area = each.get("area")
            if area is None:
                area = float(drawn(each, truth.pictures[index]).sum())
            objects.append({**each, "area": area, "id": len(objects) + 1})
    return {
        "images": [truth.pictures[index] for index in counted],
        "annotations": objects,
        "categories": [
            {"id": number, "name": truth.classes[label]} for label, number in truth.category_ids.items()
        ],
    }


def _annotations(detections: Sequence[Mapping[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Numbered from 1, with the area by which small and large ones are told apart."""
    return [
        {**each, "id": number, "iscrowd": 0, "area": _area(each, kind)}
        for number, each in enumerate(detections, start=1)
    ]


def _area(detection: Mapping[str, Any], kind: str) -> float:
    if kind == "box":
        return float(detection["bbox"][2] * detection["bbox"][3])
    return float(coco_tools().area(detection["segmentation"]))


def _percent(value: float) -> float:
    return value if value < 0 else 100 * value
