"""A real browser for the pages; their tests are skipped where there is none."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.dino.attention.in_browser import Opener, settle

_BROWSERS = ("chromium", "google-chrome", "chromium-browser")
_FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--no-first-run"),
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(_BROWSERS)} is installed")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=_FLAGS)
        yield running
        running.close()


@pytest.fixture
def show(browser: Any) -> Iterator[Opener]:
    """Opens a page from disk; in the end it has asked nothing of a network and complained of nothing."""
    faults: list[str] = []
    contexts = []

    def watch(request: Any) -> None:
        if not request.url.startswith(("file://", "data:", "blob:")):
            faults.append(request.url)

    def complaint(message: Any) -> None:
        if message.type in ("error", "warning"):
            faults.append(message.text)

    def open_page(path: Path, width: int = 1200, height: int = 900, **settings: Any) -> Any:
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, **settings))
        page = contexts[-1].new_page()
        page.set_default_timeout(10_000)
        page.on("request", watch)
        page.on("console", complaint)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(path.resolve().as_uri())
        if settings.get("java_script_enabled", True):
            settle(page)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []
