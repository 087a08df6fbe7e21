import pickle
import re
import struct
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torchvision
from PIL import Image

from dino.runtime.options import UserError
from dino.runtime.pictures import open_pictures


def write_mnist(root: Path) -> dict[str, np.ndarray]:
    """MNIST's own files, tiny."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    stored = {}
    for prefix, count in (("train", 5), ("t10k", 3)):
        random = np.random.default_rng(count)
        images, labels = random.integers(0, 256, (count, 28, 28), np.uint8), np.arange(count, dtype=np.uint8)
        header = struct.pack(">4I", 0x803, count, 28, 28)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, count) + labels.tobytes())
        stored[prefix] = images
    return stored


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*arguments: object, **options: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)


@pytest.mark.usefixtures("no_network")
def test_a_set_that_is_there_needs_no_network(tmp_path: Path) -> None:
    stored = write_mnist(tmp_path)
    train, val = (open_pictures(f"MNIST:{tmp_path}", split=split) for split in ("train", "val"))
    assert (train.labels, val.labels) == ([0, 1, 2, 3, 4], [0, 1, 2])
    assert train.classes[:2] == ["0 - zero", "1 - one"]
    assert val.name(2) == "MNIST/val/000002"
    copy = pickle.loads(pickle.dumps(val))
    assert copy.picture(2).mode == "RGB"
    assert np.array_equal(np.asarray(copy.picture(2))[..., 0], stored["t10k"][2])


@pytest.mark.usefixtures("no_network")
def test_sets_are_kept_in_the_cache_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    write_mnist(tmp_path / "datasets")
    assert len(open_pictures("MNIST")) == 5


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", ["CIFAR10", "STL10", "Flowers102", "Imagenette", "OxfordIIITPet", "EuroSAT"])
def test_a_set_that_is_neither_there_nor_reachable_is_one_sentence(tmp_path: Path, name: str) -> None:
    sentence = rf"^{name} is not in {re.escape(str(tmp_path))} and cannot be downloaded: .*no network.*$"
    with pytest.raises(UserError, match=sentence):
        open_pictures(f"{name}:{tmp_path}")


@pytest.mark.parametrize(
    ("valid", "split", "expected"),
    [
        (("train", "test"), "train", "train"),
        (("train", "test"), "val", "test"),
        (("train", "valid", "test"), "val", "valid"),
        (("trainval", "test"), "train", "trainval"),
    ],
)
def test_the_split_is_the_nearest_that_the_set_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, valid: tuple[str, ...], split: str, expected: str
) -> None:
    class Set:
        def __init__(self, root: Path, split: str = "train", download: bool = False) -> None:
            if split not in valid:
                raise ValueError(f"Unknown value '{split}' for argument split.\n Valid values are {valid}.")
            self.split = split
            self._samples = [("path", label) for label in (1, 0)]
            self.classes = [("tench", "Tinca"), ("springer",)]

        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            return Image.new("L", (len(self.split), 1)), index

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Set)
    pictures = open_pictures(f"CIFAR10:{tmp_path}", split=split)
    assert pictures.picture(0).size == (len(expected), 1)
    assert (pictures.classes, pictures.labels) == (["tench", "springer"], [1, 0])


def test_a_split_that_a_set_lacks_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Set:
        def __init__(self, root: Path, split: str = "all", download: bool = False) -> None:
            raise ValueError(f"Unknown value '{split}'.\n  Valid values are {{'all'}}.")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Set)
    sentence = "CIFAR10 has nothing for the split 'val': Unknown value 'val'. Valid values are {'all'}."
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        open_pictures(f"CIFAR10:{tmp_path}", split="val")


def test_sets_without_a_label_per_picture_have_no_classes() -> None:
    pictures = open_pictures("FakeData")
    assert (len(pictures), pictures.labels, pictures.classes) == (1000, None, [])
    assert pictures.picture(0).size == (224, 224)


def test_what_holds_no_pictures_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clips:
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
            return np.zeros((2, 3, 4, 4)), 0

    monkeypatch.setattr(torchvision.datasets, "FakeData", Clips)
    with pytest.raises(UserError, match="FakeData is not a set of pictures, or is damaged"):
        open_pictures("FakeData")


@pytest.mark.parametrize("name", ["ImageNet", "imagenet", "ImageNet:/data"])
def test_a_set_that_only_its_owners_hand_out_is_asked_for_as_a_folder(name: str) -> None:
    sentence = "^torchvision cannot download ImageNet: give the folder that holds it$"
    with pytest.raises(UserError, match=sentence):
        open_pictures(name)


def test_the_usual_sets_are_known() -> None:
    from dino.runtime.torchvision_sets import _known_sets

    names = (
        "CIFAR10 CIFAR100 Imagenette STL10 Flowers102 OxfordIIITPet Food101 EuroSAT SVHN DTD Country211 MNIST"
    )
    assert set(names.split()) < set(_known_sets())
    assert set(_known_sets()).isdisjoint({"ImageFolder", "DatasetFolder", "VisionDataset", "CocoDetection"})
