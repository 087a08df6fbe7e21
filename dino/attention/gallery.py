"""A page that shows what the heads see: every picture with its heads, live, and the videos, in one html file.

    gallery = Gallery(folder, "Attention", note="xcit_small_12_p16, last class-attention block")
    gallery.add_picture("dog.jpg", image, maps, patch_size=16, folder=folder / "dog")
    gallery.add_video("clip.mp4", [("overlay", folder / "clip.mp4")])
    gallery.write()

The page holds previews and weights itself, asks no network and links to the full-size files beside it.
H heads, R and C rows and columns of patches.
"""

import base64
import io
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from dino.attention.marks import HeadColors
from dino.attention.page import assemble, escape, link
from dino.attention.render import ByteArray, FloatArray, palette
from dino.runtime.files import write_atomically, writing

NAME = "index.html"

_COLORMAPS = ("inferno", "viridis", "turbo", "gray")
_LONGEST_SIDE = 960
_QUALITY = 82

# What a browser still decodes and redraws at once; beyond it, patches are averaged for the page.
_MOST_PATCHES = 40_000

_FULL_SIZE_SUFFIXES = frozenset({".png", ".npz", ".npy", ".jpg", ".jpeg", ".webp", ".gif", ".mp4"})
# Coarse clocks of file systems: a file may seem this much older than it is, in seconds.
_CLOCK = 2.0

_LEGEND = """<p>Every head weighs all patches of a picture by how much the class token takes from each: its
attention. <strong>Heat</strong> shows the weights of the heads that are switched on, from least to most, each
picture on its own scale up to the 99th percentile. <strong>Mask</strong> keeps the fewest patches that hold the part
of the attention you ask for, and darkens the rest. <strong>Colours</strong> does so for each head in a colour of
its own; where several keep a patch, it has the colour of the one with the larger share of its attention there.</p>
<p>Drag across a picture to compare it with the original. With the keyboard in a picture: <kbd>0</kbd> to
<kbd>9</kbd> switch a head, with <kbd>Shift</kbd> it is shown alone (as by a double click), <kbd>←</kbd>
<kbd>→</kbd> move the slider and, in the large view, go to the next picture.</p>"""


@dataclass(frozen=True)
class _Picture:
    """One picture as html, but for the links to its files: these are looked up when the page is written."""

    body: str
    heads: int
    folder: Path


class Gallery:
    """The page `index.html` beside the outputs of a command.

    Args:
        folder: where the page goes; made where it is missing.
        title: heading of the page.
        note: one line below it, such as the model and its weights; empty: none.
        threshold: part of the attention, in [0, 1], that masks keep at first; whole percents.

    Raises:
        ValueError: the threshold is no part.
    """

    def __init__(self, folder: Path, title: str, note: str = "", threshold: float = 0.6) -> None:
        if not 0 <= threshold <= 1:
            raise ValueError(f"the part of the attention to keep is between 0 and 1, got {threshold}")
        self.folder = folder
        self.title = title
        self.note = note
        self.threshold = threshold
        self._begun = time.time()
        self._pictures: list[_Picture] = []
        self._videos: list[str] = []

    def add_picture(
        self, name: str, image: ByteArray, maps: FloatArray, patch_size: int, folder: Path
    ) -> None:
        """Take in a picture with its heads; nothing is kept of the arrays but what the page shows.

        Args:
            name: its heading.
            image: (rows, cols, 3) uint8 RGB, as the network saw it.
            maps: raw weights (H, R, C), one per patch, not negative; what is not finite counts as 0.
            patch_size: side of a patch in pixels.
            folder: where its full-size files lie: the page links to this folder, and to the pictures, arrays
                and videos in it that were written since this gallery was made.

        Raises:
            ValueError: the maps do not have one value per patch of the image.
        """
        rows, cols = image.shape[:2]
        grid = tuple(-(-side // patch_size) for side in (rows, cols))
        if maps.ndim != 3 or not len(maps) or maps.shape[1:] != grid:
            raise ValueError(
                f"an image of {rows} x {cols} pixels has maps of {grid[0]} x {grid[1]} patches of {patch_size} "
                f"for each head, got {' x '.join(map(str, maps.shape))}"
            )
        weights = np.maximum(np.nan_to_num(np.asarray(maps, np.float32), nan=0, posinf=0, neginf=0), 0)
        times = _times_too_fine(grid)
        facts = (
            f"{cols} &times; {rows} pixels · {grid[1]} &times; {grid[0]} patches of {patch_size} · "
            f"{len(maps)} {'head' if len(maps) == 1 else 'heads'}"
        )
        hint = (
            f'<p class="soft">For this page, weights are averaged over blocks of {times} &times; {times} patches; '
            "the full-size files have every patch.</p>"
            if times > 1
            else ""
        )
        body = (
            f'<article class="card picture" data-heads="{len(maps)}">'
            f'<header><h2>{escape(name)}</h2><p class="soft">{facts}</p></header>'
            f'<div class="place">{_preview(image, name)}</div>{hint}'
            f'<script type="application/json" class="maps">'
            f"{_stored(_averaged(weights, times), patch_size * times, (rows, cols))}</script>"
        )
        self._pictures.append(_Picture(body, len(maps), folder))

    def add_video(self, name: str, files: Sequence[tuple[str, Path]], note: str = "") -> None:
        """Take in the outputs of one video.

        Args:
            name: their heading.
            files: label and file of each: mp4 plays in place, gif moves in place, others are linked to.
            note: one line, such as size, frames and scale; empty: none.
        """
        figures = "".join(_figure(name, label, file, self.folder) for label, file in files)
        self._videos.append(
            f'<article class="card videos"><header><div><h3>{escape(name)}</h3>{_soft(note)}</div></header>'
            f'<div class="reel">{figures}</div></article>'
        )

    def write(self) -> Path:
        """Write the page; under its final name it is whole or not there. Returns its path.

        Raises:
            UserError: it cannot be written.
        """
        page = assemble(
            "gallery.html",
            styles=("page.css", "gallery.css"),
            scripts=("maps.js", "gallery.js", "videos.js"),
            parts={
                "title": escape(self.title),
                "note": f"<p>{escape(self.note)}</p>" if self.note else "",
                "threshold": str(round(100 * self.threshold)),
                "swatches": "".join(map(_swatch, _COLORMAPS)),
                "colormaps": json.dumps({name: _base64(palette(name).tobytes()) for name in _COLORMAPS}),
                "head_colours": json.dumps([HeadColors().color(head) for head in range(self._most_heads())]),
                "pictures": self._picture_section(),
                "videos": self._video_section(),
                "legend": _LEGEND if self._pictures else "",
            },
        )
        path = self.folder / NAME
        with writing(path):
            self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
        return path

    def _picture_section(self) -> str:
        if not self._pictures:
            return "" if self._videos else '<p class="soft">Nothing to show yet.</p>'
        articles = "\n".join(f"{picture.body}{self._files(picture)}</article>" for picture in self._pictures)
        return f'<section class="pictures" aria-label="Pictures">\n{articles}\n</section>'

    def _most_heads(self) -> int:
        return max((picture.heads for picture in self._pictures), default=0)

    def _video_section(self) -> str:
        if not self._videos:
            return ""
        articles = "\n".join(self._videos)
        return f'<section class="part"><h2>Videos</h2>\n{articles}\n</section>'

    def _files(self, picture: _Picture) -> str:
        """Links to the full-size files of a picture."""
        items = [
            f'<li><a href="{link(file, self.folder)}">{escape(file.name)}</a></li>'
            for file in _written_since(self._begun - _CLOCK, picture.folder)
        ]
        folder = f'<a href="{link(picture.folder, self.folder)}/">folder</a>'
        if not items:
            return f'<p class="files">Full-size files: {folder}</p>'
        return (
            f'<details class="files"><summary>Full-size files ({len(items)})</summary>'
            f"<ul>{''.join(items)}</ul><p>All of them lie in this {folder}.</p></details>"
        )


def _written_since(moment: float, folder: Path) -> list[Path]:
    """What a command has just written, and not what a user keeps in the same folder."""
    if not folder.is_dir():
        return []
    files = [file for file in folder.iterdir() if file.suffix.lower() in _FULL_SIZE_SUFFIXES]
    return sorted(file for file in files if file.is_file() and file.stat().st_mtime >= moment)


def _times_too_fine(grid: tuple[int, ...]) -> int:
    """Side of the blocks of patches to average, the smallest that leaves few enough of them."""
    side = 1
    while -(-grid[0] // side) * -(-grid[1] // side) > _MOST_PATCHES:
        side += 1
    return side


def _averaged(maps: FloatArray, side: int) -> FloatArray:
    """Means over blocks of side x side patches; those at the lower and right edge may hold fewer."""
    if side == 1:
        return maps
    sums = np.asarray(maps, np.float64)
    for axis in (1, 2):
        sums = np.add.reduceat(sums, np.arange(0, maps.shape[axis], side), axis=axis)
    counts = [np.diff(np.append(np.arange(0, count, side), count)) for count in maps.shape[1:]]
    return (sums / np.multiply.outer(*counts)).astype(np.float32)


def _stored(maps: FloatArray, patch_size: int, size: tuple[int, int]) -> str:
    """JSON: the weights of each head as uint16 relative to its maximum, little-endian, in base64."""
    tops = maps.max(axis=(1, 2)).astype(np.float64)
    levels = np.rint(maps / np.where(tops > 0, tops, 1)[:, None, None] * 65535).astype("<u2")
    return json.dumps(
        {
            "rows": maps.shape[1],
            "cols": maps.shape[2],
            "patch": patch_size,
            "height": size[0],
            "width": size[1],
            "tops": tops.tolist(),
            "heads": [_base64(head.tobytes()) for head in levels],
        }
    )


def _preview(image: ByteArray, name: str) -> str:
    rows, cols = image.shape[:2]
    scale = min(1.0, _LONGEST_SIDE / max(rows, cols))
    size = max(1, round(cols * scale)), max(1, round(rows * scale))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA) if scale < 1 else image
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(small, np.uint8)).save(buffer, format="JPEG", quality=_QUALITY)
    return (
        f'<img src="data:image/jpeg;base64,{_base64(buffer.getvalue())}" width="{size[0]}" height="{size[1]}" '
        f'alt="{escape(name)}" decoding="async">'
    )


def _figure(name: str, label: str, file: Path, folder: Path) -> str:
    title, address = f"{escape(name)}, {escape(label)}", link(file, folder)
    match file.suffix.lower():
        case ".mp4":
            show = (
                f'<video controls loop playsinline preload="metadata" src="{address}" aria-label="{title}">'
                "</video>"
            )
        case ".gif":
            show = (
                '<details class="animation" open><summary>Animation</summary>'
                f'<img src="{address}" alt="{title}" loading="lazy"></details>'
            )
        case _:
            return f'<p><a href="{address}">{escape(label)}</a></p>'
    caption = f'{escape(label)} · <a href="{address}" aria-label="{title}: file">file</a>'
    return f"<figure>{show}<figcaption>{caption}</figcaption></figure>"


def _soft(text: str) -> str:
    return f'<p class="soft">{escape(text)}</p>' if text else ""


def _swatch(colormap: str) -> str:
    stops = ",".join(f"rgb{tuple(map(int, colour))}" for colour in palette(colormap)[:: 255 // 8])
    checked = " checked" if colormap == _COLORMAPS[0] else ""
    return (
        f'<label title="{colormap}"><input type="radio" name="colormap" value="{colormap}"{checked}>'
        f'<span class="colours" style="background-image:linear-gradient(to right,{stops})"></span>'
        f'<span class="unseen">{colormap}</span></label>'
    )


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
