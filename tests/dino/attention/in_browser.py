"""What the tests of the pages ask of a browser."""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

Opener = Callable[..., Any]


def settle(page: Any) -> None:
    """Wait until everything that a change asked for is drawn."""
    page.evaluate(
        """async () => {
            const frame = () => new Promise((done) => setTimeout(() => requestAnimationFrame(done), 20));
            do { await frame(); await frame(); } while (typeof waiting !== "undefined" && waiting.size);
        }"""
    )


def screen(page: Any, selector: str = ".frame") -> np.ndarray:
    """What a user sees of it, (rows, cols, 3), without the slider's handle."""
    page.add_style_tag(content=".grip { display: none }")
    with Image.open(io.BytesIO(page.locator(selector).first.screenshot())) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def nameless(page: Any) -> list[str]:
    """Roles of the controls and pictures that a screen reader would find without a name."""
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    roles = ("button", "slider", "radio", "checkbox", "link", "image", "dialog", "region", "Video")
    told = [node for node in nodes if not node["ignored"] and node["role"]["value"] in roles]
    assert len(told) > 5
    return [node["role"]["value"] for node in told if not node.get("name", {}).get("value", "").strip()]
