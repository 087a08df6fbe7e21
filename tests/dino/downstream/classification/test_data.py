import json

import pytest
from PIL import Image

from dino.downstream.classification.data import NAMES, open_both, open_to_evaluate
from dino.downstream.classification.inaturalist import open_inaturalist
from dino.runtime import torchvision_sets
from dino.runtime.options import UserError
from tests.dino.small_runs import write_pictures

TAXONOMY = [
    {"id": 0, "name": "Felis catus", "genus": "Felis", "kingdom": "Animalia"},
    {"id": 1, "name": "Canis lupus", "genus": "Canis", "kingdom": "Animalia"},
    {"id": 7, "name": "Bellis perennis", "genus": "Bellis", "kingdom": "Plantae"},
]


def write_inaturalist(root, year=2018):
    (root / "categories.json").write_text(json.dumps(TAXONOMY))
    for split, categories in (("train", (1, 0, 7, 0)), ("val", (7, 0))):
        images, annotations = [], []
        for number, category in enumerate(categories):
            file = f"{split}_val{year}/{category}/{number}.png"
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (category, number, 0)).save(root / file)
            images.append({"id": 10 + number, "file_name": file})
            annotations.append({"image_id": 10 + number, "category_id": category})
        content = {"images": images[::-1], "annotations": annotations}
        (root / f"{split}{year}.json").write_text(json.dumps(content))
    return root


@pytest.mark.parametrize(("data_set", "year"), [("INAT", 2018), ("INAT19", 2019)])
def test_inaturalist_is_read_from_its_competitions_files(tmp_path, data_set, year):
    train, val = open_both(data_set, str(write_inaturalist(tmp_path, year)), "name")
    assert train.classes == val.classes == ["Bellis perennis", "Canis lupus", "Felis catus"]
    assert train.labels == [1, 2, 0, 2] and val.labels == [0, 2]
    assert train.picture(2).getpixel((0, 0)) == (7, 2, 0)  # the picture of the annotation, not of the place


def test_inaturalists_classes_are_those_of_a_level(tmp_path):
    train = open_inaturalist(write_inaturalist(tmp_path), 2018, "train", "kingdom")
    assert train.classes == ["Animalia", "Plantae"] and train.labels == [0, 0, 1, 0]
    with pytest.raises(
        UserError, match="has no 'family' for every category; --inat_category can be genus, kingdom"
    ):
        open_inaturalist(tmp_path, 2018, "train", "family")


@pytest.mark.parametrize(
    ("file", "text", "sentence"),
    [
        (
            "categories.json",
            None,
            "No such file or directory; --data_path must be the folder of the competition",
        ),
        ("train2018.json", "{", "train2018.json is no JSON file"),
        ("train2018.json", "{}", "train2018.json holds no list of images"),
        ("categories.json", "[1]", "categories.json holds no list of categories"),
        (
            "train2018.json",
            '{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 2, "category_id": 0}]}',
            "refers to 2, which is nowhere",
        ),
    ],
)
def test_damaged_files_of_inaturalist_are_named(tmp_path, file, text, sentence):
    root = write_inaturalist(tmp_path)
    (root / file).unlink()
    if text is not None:
        (root / file).write_text(text)
    with pytest.raises(UserError, match=sentence):
        open_inaturalist(root, 2018, "train", "name")


class FakeSet:
    """Of torchvision, with three splits, each of another brightness."""

    classes = ("rose", "tulip")

    def __init__(self, root, split="train", transform=None, download=False):
        sizes = {"train": 2, "val": 3, "test": 4}
        if split not in sizes:
            raise ValueError(f"no split {split}")
        self.split, self._labels = split, [number % 2 for number in range(sizes[split])]

    def __len__(self):
        return len(self._labels)

    def __getitem__(self, index):
        level = {"train": 0, "val": 100, "test": 200}[self.split] + index
        return Image.new("RGB", (4, 4), (level, 0, 0)), self._labels[index]


@pytest.fixture
def fake_sets(monkeypatch):
    known = {"Flowers102": FakeSet, "StanfordCars": FakeSet}
    monkeypatch.setattr(torchvision_sets, "_known_sets", lambda: known)


def levels(pictures):
    return [pictures.picture(index).getpixel((0, 0))[0] for index in range(len(pictures))]


def test_flowers_are_trained_on_both_small_parts_and_evaluated_on_the_large_one(tmp_path, fake_sets):
    train, test = open_both("FLOWERS", str(tmp_path), "name")
    assert levels(train) == [0, 1, 100, 101, 102] and levels(test) == [200, 201, 202, 203]
    assert train.labels == [0, 1, 0, 1, 0] and train.classes == ["rose", "tulip"]
    assert (
        len({train.name(index) for index in range(5)})
        == len({train.stamp(index)[0] for index in range(5)})
        == 5
    )


def test_cars_are_the_set_of_torchvision_in_the_folder(tmp_path, fake_sets):
    train, val = open_both("CARS", str(tmp_path), "name")
    assert len(train) == 2 and len(val) == 3
    with pytest.raises(UserError, match="is no file or folder, nor demo, nor a data set of torchvision"):
        open_both("PLANES", str(tmp_path), "name")


def test_a_folder_is_what_the_original_calls_imnet(tmp_path):
    write_pictures(tmp_path / "train", count=3)
    write_pictures(tmp_path / "val", count=2)
    train, val = open_both("IMNET", str(tmp_path), "name")
    assert (len(train), len(val)) == (6, 4)
    (tmp_path / "train").rename(tmp_path / "elsewhere")
    val, classes = open_to_evaluate("IMNET", str(tmp_path), "name")
    assert len(val) == 4 and classes == ["cats", "dogs"]


def test_the_names_of_the_original_are_all_there_but_the_one_it_does_not_implement():
    assert set(NAMES) == {"IMNET", "CIFAR10", "CIFAR100", "INAT", "INAT19", "CARS", "FLOWERS"}
    with pytest.raises(UserError, match="does not implement"):
        open_both("IMNET22k", "", "name")


def test_joined_sets_read_as_they_are_told_to(tmp_path, fake_sets):
    train, _ = open_both("FLOWERS", str(tmp_path), "name")
    train.as_stored = True
    train.picture(3)
    assert train.parts[1].as_stored and not train.parts[0].as_stored
    train.picture(0)
    assert train.parts[0].as_stored
