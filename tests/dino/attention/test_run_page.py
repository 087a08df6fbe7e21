"""The page of a run, read back with Python's own html parser."""

import json
import math
import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dino.attention.run_page import write_run_page
from dino.runtime.options import UserError

ROWS = [
    {"epoch": 0, "train_loss": 4.8, "loss_over_ln_k": 0.98},
    {"epoch": 1, "train_loss": 4.5, "knn": 41.05, "knn_balanced": 28.36, "knn_random": 33.43},
    {"epoch": 2, "train_loss": 4.2, "knn": None},
    {"epoch": 3, "train_loss": 4.0, "knn": 43.99, "knn_balanced": 34.47, "knn_random": 33.43},
    {"epoch": 4, "train_loss": None, "knn": 42.82, "knn_balanced": None, "knn_random": 33.43},
]


def run(folder: Path, sheets=(), curves=False) -> Path:
    (folder / "attention").mkdir()
    for epochs in sheets:
        sheet = np.full((30, 50, 3), epochs, np.uint8)
        Image.fromarray(sheet).save(folder / "attention" / f"epoch_{epochs:04}.png")
    if curves:
        (folder / "curves.png").touch()
    return folder


def html(*arguments, **options) -> str:
    return write_run_page(*arguments, **options).read_text(encoding="utf-8")


def cells(page):
    rows = re.findall(r"<tr.*?</tr>", page)
    return [[unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in rows]


def headline(page):
    return [pair[::-1] for pair in re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page)]


def sheets(page):
    return json.loads(re.search(r'id="sheets">(.*?)</script>', page)[1])


def test_the_numbers_of_a_run_stand_above_everything(tmp_path):
    assert headline(html(tmp_path, ROWS, "run")) == [
        ("42.8 %", "20-NN accuracy after 5 epochs"),
        ("44.0 %", "the best, after 4 epochs"),
        ("33.4 %", "of the random network before training"),
        ("5", "epochs trained"),
    ]


def test_a_continued_run_is_compared_with_the_weights_that_it_was_given(tmp_path):
    rows = [{"knn_init" if key == "knn_random" else key: value for key, value in row.items()} for row in ROWS]
    page = html(tmp_path, rows, "run")
    assert ("33.4 %", "of the given weights before training") in headline(page)
    assert cells(page)[-1][3] == "+9.4"


def test_each_look_has_a_row_in_the_table(tmp_path):
    none = "\N{EN DASH}"
    assert cells(html(tmp_path, ROWS, "run", neighbours=10)) == [
        ["When", "10-NN, %", "balanced, %", "over the start, points", "loss"],
        ["before training", "33.4", none, none, none],
        ["after 2 epochs", "41.0", "28.4", "+7.6", "4.500"],
        ["after 4 epochs, the best", "44.0", "34.5", "+10.6", "4.000"],
        ["after 5 epochs", "42.8", none, "+9.4", none],
    ]


def test_the_sheets_are_in_order_with_the_accuracy_measured_at_each(tmp_path):
    folder = run(tmp_path, sheets=(12, 0, 2, 3, 5), curves=True)
    for other in ("epoch_0001.png.tmp", ".epoch_0001.png", "epoch_.png", "notes.png"):
        (folder / "attention" / other).touch()
    page = html(folder, ROWS, "run")
    assert [sheet["label"] for sheet in sheets(page)] == [
        "before training · 20-NN 33.4 %",
        "after 2 epochs · 20-NN 41.0 %",
        "after 3 epochs",
        "after 5 epochs · 20-NN 42.8 %",
        "after 12 epochs",
    ]
    assert all((folder / sheet["address"]).is_file() for sheet in sheets(page))
    assert (
        'src="attention/epoch_0012.png" width="50" height="30" alt="Attention maps, after 12 epochs"' in page
    )
    assert re.search(r'<img src="curves.png" alt="[^"]+"', page)


def test_of_rows_with_the_same_epoch_the_last_counts(tmp_path):
    rows = [*ROWS, {"epoch": 4, "train_loss": 3.9, "knn": 50.0}]
    assert cells(html(tmp_path, rows, "run"))[-1][:2] == ["after 5 epochs, the best", "50.0"]


@pytest.mark.parametrize("knn", [None, math.nan, math.inf, "lost"])
def test_a_run_without_accuracies_shows_what_it_has(tmp_path, knn):
    page = html(run(tmp_path, sheets=(0, 1)), [{"epoch": 0, "train_loss": 4.8, "knn": knn}], "run")
    assert headline(page) == [("1", "epoch trained")]
    assert [sheet["label"] for sheet in sheets(page)] == ["before training", "after 1 epoch"]
    assert "<table" not in page and "No k-NN accuracy has been measured" in page


def test_an_accuracy_without_that_of_the_random_network_is_compared_with_none(tmp_path):
    page = html(tmp_path, [{"epoch": 0, "knn": 20.0}], "run")
    assert cells(page)[1:] == [["after 1 epoch, the best", "20.0", *["\N{EN DASH}"] * 3]]


def test_a_run_that_has_not_begun_has_a_page(tmp_path):
    page = html(tmp_path / "new", [], "run")
    assert headline(page) == [("0", "epochs trained")]
    assert "curves.png" not in page and "attention/" not in page


def test_a_sheet_that_is_damaged_keeps_no_page_from_being_written(tmp_path):
    folder = run(tmp_path, sheets=(0, 1))
    (folder / "attention" / "epoch_0002.png").write_bytes(b"\x89PNG broken")
    page = html(folder, [], "run")
    assert len(sheets(page)) == 3 and 'src="attention/epoch_0002.png" alt=' in page


def test_a_title_is_text(tmp_path):
    page = html(tmp_path, ROWS, "</title><script>alert(1)</script>")
    assert page.count("<script") == 1 and "&lt;script&gt;alert(1)" in page


def test_a_page_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*index\.html"):
        write_run_page(tmp_path / "file", ROWS, "run")
