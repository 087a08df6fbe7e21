"""The page of a run in a real browser; skipped where there is none."""

from pathlib import Path

import pytest
from PIL import Image

from dino.attention.run_page import write_run_page
from tests.dino.attention.in_browser import Opener, nameless, screen, settle

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

pytestmark = pytest.mark.slow


def run(folder: Path, sheets: tuple[int, ...]) -> Path:
    (folder / "attention").mkdir(parents=True)
    for epochs in sheets:
        Image.new("RGB", (90, 60), (0, 40 * epochs, 0)).save(folder / f"attention/epoch_{epochs:04}.png")
    rows = [
        {"epoch": epoch, "knn": 30.0 + epoch, "knn_random": 16.6, "train_loss": 4.0} for epoch in range(4)
    ]
    return write_run_page(folder, rows, "A run")


def test_the_time_lapse_goes_through_the_sheets(tmp_path: Path, show: Opener):
    page = show(run(tmp_path, (0, 2, 4)))
    slider, label, button = (page.locator(f"#{name}") for name in ("epoch", "label", "play"))

    def green() -> int:
        settle(page)
        return int(screen(page, "#sheet")[20, 20, 1])

    assert (label.inner_text(), green()) == ("after 4 epochs · 20-NN 33.0 %", 160)
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert (label.inner_text(), green()) == ("after 2 epochs · 20-NN 31.0 %", 80)
    page.keyboard.press("Home")
    assert (label.inner_text(), green()) == ("before training · 20-NN 16.6 %", 0)
    assert slider.get_attribute("aria-valuetext") == label.inner_text()
    page.keyboard.press("Space")
    assert "Pause" in button.inner_text()
    sync_api.expect(label).to_have_text("after 2 epochs · 20-NN 31.0 %")
    page.keyboard.press("Space")
    assert "Play" in button.inner_text()
    button.click()
    sync_api.expect(button).to_contain_text("Play")
    assert (label.inner_text(), green()) == ("after 4 epochs · 20-NN 33.0 %", 160)


@pytest.mark.parametrize("sheets", [(), (0,), (0, 4)])
def test_the_page_of_a_run_fits_a_phone(tmp_path: Path, show: Opener, sheets: tuple[int, ...]):
    page = show(run(tmp_path, sheets), width=360, height=740, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.locator("#player").is_visible() == (len(sheets) > 1)


def test_every_control_has_a_name(tmp_path: Path, show: Opener):
    assert nameless(show(run(tmp_path, (0, 1)))) == []


def test_a_sheet_that_is_gone_does_not_stop_the_others(tmp_path: Path, browser):
    path = run(tmp_path, (0, 2, 4))
    (tmp_path / "attention" / "epoch_0002.png").unlink()
    page = browser.new_page()
    page.goto(path.as_uri())
    page.locator("#play").click()
    sync_api.expect(page.locator("#label")).to_contain_text("before training")
    sync_api.expect(page.locator("#label")).to_contain_text("after 4 epochs")
    sync_api.expect(page.locator("#play")).to_contain_text("Play")
    page.close()
