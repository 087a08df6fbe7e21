from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dino.downstream.detection.coco import CocoSet, open_coco, run_length
from dino.downstream.detection.coco_scores import MEASURES, score, table
from tests.dino.downstream.detection.small_coco import HEIGHT, WIDTH, annotation, opened, spoiled


def perfect(truth: CocoSet, *, shift: float = 0.0) -> list[dict[str, Any]]:
    results = []
    for index, entry in enumerate(truth.pictures):
        _, objects = truth.read(index)
        for box, label, mask in zip(objects.boxes, objects.labels.tolist(), objects.masks, strict=True):
            x0, y0, x1, y1 = box.tolist()
            moved = np.roll(mask.astype(bool), int(shift), axis=1)
            results.append(
                {
                    "image_id": entry["id"],
                    "category_id": truth.category_ids[label],
                    "bbox": [x0 + shift, y0, x1 - x0, y1 - y0],
                    "score": 0.9,
                    "segmentation": run_length(moved),
                }
            )
    return results


def test_perfect_detections_have_an_average_precision_of_100(tmp_path: Path) -> None:
    truth = opened(tmp_path)
    measures = score(truth, perfect(truth))
    assert set(measures) == set(MEASURES)
    assert measures["box_ap"] == measures["mask_ap"] == measures["box_ap75"] == pytest.approx(100)
    assert measures["box_ap_large"] == -1  # there are none
    assert len(table(measures)) == 3


def test_shifted_detections_have_less_and_none_have_nothing(tmp_path: Path) -> None:
    truth = opened(tmp_path)
    # By 2 of 15, 16 and 10 pixels: the intersections over the unions are 13/17, 14/18 and 8/12.
    shifted = score(truth, perfect(truth, shift=2))
    # cat: up to .75, 6 of 10 thresholds; dog: its two objects up to .75 and .65.
    dog = (100 * 4 + (51 / 101) * 100 * 2) / 10
    assert shifted["box_ap"] == pytest.approx((60 + dog) / 2, abs=0.1)
    assert shifted["mask_ap"] == pytest.approx(shifted["box_ap"], abs=0.1)
    assert score(truth, [])["box_ap"] == 0


def test_a_wrong_class_counts_as_nothing_found(tmp_path: Path) -> None:
    truth = opened(tmp_path)
    swapped = [{**each, "category_id": 10 - each["category_id"]} for each in perfect(truth)]
    assert score(truth, swapped)["mask_ap"] == 0


def test_what_is_found_in_a_crowd_does_no_harm(tmp_path: Path) -> None:
    crowd = {**annotation(4, 13, 3, 0, 0, 40, 30), "iscrowd": 1}
    crowd["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]}
    truth = opened(tmp_path, spoiled(lambda each: each["annotations"].append(crowd)))
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[2:9, 2:9] = True
    inside = {
        "image_id": 13,
        "category_id": 3,
        "bbox": [2, 2, 7, 7],
        "score": 0.99,
        "segmentation": run_length(mask),
    }
    assert score(truth, [*perfect(truth), inside])["box_ap"] == pytest.approx(100)
    assert score(truth, [*perfect(truth), {**inside, "image_id": 12}])["box_ap"] < 100


def test_the_first_annotation_counts_even_if_its_id_is_0(tmp_path: Path) -> None:
    truth = opened(tmp_path, spoiled(lambda each: each["annotations"][0].update(id=0)))
    assert score(truth, perfect(truth))["box_ap"] == pytest.approx(100)


def test_only_pictures_that_were_looked_at_count(tmp_path: Path) -> None:
    truth = opened(tmp_path)
    of_first = [each for each in perfect(truth) if each["image_id"] == 11]
    assert score(truth, of_first, pictures=[0])["box_ap"] == pytest.approx(100)
    assert score(truth, of_first)["box_ap"] < 100


def test_areas_that_the_file_lacks_are_those_of_the_masks(tmp_path: Path) -> None:
    truth = opened(tmp_path, spoiled(lambda each: [entry.pop("area") for entry in each["annotations"]]))
    assert score(truth, perfect(truth))["box_ap_small"] == pytest.approx(100)


def test_the_real_annotations_are_read_and_perfect_detections_of_them_score_100(shared_data: Path) -> None:
    coco = shared_data / "coco-small"
    truth = open_coco(coco / "images", coco / "annotations_val.json")
    assert len(truth) == 100 and len(truth.classes) == 80 and not truth.left_out
    assert truth.object_count() == 712 - 5
    few = truth.only({each["id"] for each in truth.pictures[:5]})
    measures = score(few, perfect(few))
    assert measures["box_ap"] == pytest.approx(100) and measures["mask_ap"] == pytest.approx(100)
