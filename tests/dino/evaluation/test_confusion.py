import csv
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import confusion_matrix

from dino.evaluation.confusion import confusion_counts, write_confusion
from dino.runtime.options import UserError

EMPTY = (226, 226, 226)


def colour(share):
    """RGB of a share in [0, 1] as the picture draws it."""
    return tuple(int(value) for value in matplotlib.colormaps["Blues"](share**0.4, bytes=True)[:3])


def write(counts, classes, folder):
    write_confusion(np.asarray(counts), classes, folder / "confusion.cls")
    assert sorted(path.name for path in folder.iterdir()) == ["confusion.cls.csv", "confusion.cls.png"]
    with (folder / "confusion.cls.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    return rows, np.asarray(Image.open(folder / "confusion.cls.png"))


def has(picture, rgb):
    return (picture == rgb).all(axis=-1)


def test_counts_equal_scikit_learn():
    generator = np.random.default_rng(0)
    labels, predictions = generator.integers(0, 6, 500).astype(np.uint8), generator.integers(0, 7, 500)
    counts = confusion_counts(labels, predictions, 7)
    np.testing.assert_array_equal(counts, confusion_matrix(labels, predictions, labels=range(7)))
    assert confusion_counts(labels[:0], predictions[:0], 7).tolist() == np.zeros((7, 7)).tolist()


def test_classes_beyond_their_number_are_refused():
    with pytest.raises(ValueError, match=r"predictions must be in \[0, 2\), got 0 to 2"):
        confusion_counts(np.array([0, 1]), np.array([0, 2]), 2)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 2\), got -1 to 1"):
        confusion_counts(np.array([-1, 1]), np.array([0, 1]), 2)
    with pytest.raises(ValueError, match=r"2 classes have 2 x 2 counts, got \(3, 3\)"):
        write_confusion(np.zeros((3, 3), np.int64), ["a", "b"], None)


def test_names_with_commas_quotes_and_letters_of_all_kinds_survive_the_csv(tmp_path):
    classes = ["tench, Tinca tinca", 'a "b"', "Bär\nund 猫", "price $x^", ""]
    counts = np.arange(25).reshape(5, 5)
    rows, _ = write(counts, classes, tmp_path)
    assert rows[0][1:] == classes and [row[0] for row in rows[1:]] == classes
    assert [[int(cell) for cell in row[1:]] for row in rows[1:]] == counts.tolist()


def test_a_name_that_is_no_unicode_is_written_with_escapes(tmp_path):
    rows, _ = write(np.eye(2, dtype=int), ["caf\udce9", "tea"], tmp_path)
    assert rows[0][1:] == ["caf\\udce9", "tea"]


def test_a_cell_has_the_colour_of_its_share_of_its_row(tmp_path):
    _, picture = write([[50, 50], [0, 7]], ["cats", "dogs"], tmp_path)
    for share, count in ((0.5, 2), (1.0, 1), (0.0, 1)):
        assert has(picture, colour(share)).sum() == pytest.approx(
            count * 90 * 90, rel=0.05
        )  # less the numbers


def test_rows_of_classes_without_pictures_stay_empty(tmp_path):
    _, picture = write([[4, 0, 0], [0, 0, 0], [1, 0, 3]], ["a", "b", "c"], tmp_path)
    empty = np.flatnonzero(has(picture, EMPTY).sum(axis=1) >= 3 * 90)
    assert empty.tolist() == list(range(empty[0], empty[0] + 90))


def test_no_pictures_at_all_are_drawn_as_such(tmp_path):
    rows, picture = write(np.zeros((2, 2), int), ["a", "b"], tmp_path)
    assert rows[1] == ["a", "0", "0"]
    assert (has(picture, EMPTY).sum(axis=1) >= 2 * 90).sum() == 2 * 90


def test_names_and_numbers_are_drawn_while_they_can_be_read(tmp_path):
    def ink(classes):
        stem = tmp_path / str(len(classes))
        write_confusion(np.eye(len(classes), dtype=np.int64), classes, stem)
        picture = np.asarray(Image.open(stem.with_name(f"{stem.name}.png")))
        return picture[64 : 64 + 900, :90].tobytes()  # left of the matrix

    few, many = [f"a{number}" for number in range(30)], [f"a{number}" for number in range(31)]
    assert ink(few) != ink(["b" + name[1:] for name in few])
    assert ink(many) == ink(["b" + name[1:] for name in many])


def test_long_names_are_shortened(tmp_path):
    widths = []
    for length in (20, 25, 500):
        _, picture = write(np.eye(2, dtype=int), ["n" * length, "m"], tmp_path)
        widths.append(picture.shape[1])
    assert len(set(widths)) == 1


@pytest.mark.parametrize("num_classes", [31, 100, 1000, 1100])
def test_every_cell_of_many_classes_is_at_least_a_pixel(num_classes, tmp_path):
    order = np.random.default_rng(0).permutation(num_classes)
    counts = np.zeros((num_classes, num_classes), np.int64)
    counts[np.arange(num_classes), order] = 3
    _, picture = write(counts, [f"class {number}" for number in range(num_classes)], tmp_path)
    cell = max(1, 800 // num_classes)
    matrix = has(picture, colour(1.0))[64:, 70:][: cell * num_classes, : cell * num_classes]
    np.testing.assert_array_equal(matrix, np.repeat(np.repeat(counts > 0, cell, 0), cell, 1))


def test_counts_are_left_as_they_are(tmp_path):
    counts = np.array([[3, 1], [0, 0]])
    write(counts, ["a", "b"], tmp_path)
    assert counts.tolist() == [[3, 1], [0, 0]]


def test_files_that_cannot_be_written_are_refused_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*missing/confusion\.csv"):
        write_confusion(np.eye(2, dtype=np.int64), ["a", "b"], tmp_path / "missing" / "confusion")


def test_drawing_knows_neither_torch_nor_pyplot():
    code = (
        "import sys, dino.evaluation.confusion\n"
        "assert not {'torch', 'sklearn', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
