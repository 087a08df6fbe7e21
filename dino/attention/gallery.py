"""A page that shows what the heads see: every picture with its heads, live, and the videos, in one html file.

    gallery = Gallery(folder, "Attention", note="xcit_small_12_p16, last class-attention block")
    gallery.add_picture("dog.jpg", image, maps, patch_size=16, folder=folder / "dog", files=["img.png"])
    gallery.add_video("clip.mp4", [("overlay", folder / "clip.mp4")])
    gallery.write()

The page holds previews and weights itself, asks no network and links to the full-size files beside it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dino.attention.marks import HeadColors
from dino.attention.page import assemble, escape, link
from dino.attention.page.picture_article import in_base64, picture_article
from dino.attention.render import ByteArray, FloatArray, palette
from dino.runtime.files import write_atomically, writing

NAME = "index.html"

_COLORMAPS = ("inferno", "viridis", "turbo", "gray")

# What a browser opens without a wait; pictures beyond it are linked to.
_MOST_LETTERS = 150_000_000

_LEGEND = """<p>Every head weighs all patches of a picture by how much the class token takes from each: its
attention. <strong>Heat</strong> shows the weights of the heads that are switched on, {scale}.
<strong>Mask</strong> keeps the fewest patches that hold the part of the attention you ask for, and darkens the rest.
<strong>Colours</strong> does so for each head in a colour of its own; where several keep a patch, it has the colour
of the one with the larger share of its attention there.</p>
<p>Drag across a picture to compare it with the original: attention is on the left of the handle. With the keyboard
in a picture: <kbd>0</kbd> to <kbd>9</kbd> switch a head, with <kbd>Shift</kbd> it is shown alone (as by a double
click), <kbd>←</kbd> <kbd>→</kbd> move the slider and, in the large view, go to the next picture.</p>"""


@dataclass(frozen=True)
class PageLook:
    """What the page's controls begin with, and its scale.

    Args:
        threshold: part of the attention, in [0, 1], that masks keep; whole percents.
        colormap: name of one of matplotlib's.
        opacity: of what is drawn over a picture, in [0, 1]; whole percents.
        smooth: interpolate between patches.
        percentiles: low and high, in [0, 100], of each map's weights that are shown darkest and brightest.
        scale: fixed limits instead, (low, high) in multiples of an even share; see `scale.FixedScale`.

    Raises:
        ValueError: the threshold is no part.
    """

    threshold: float = 0.6
    colormap: str = _COLORMAPS[0]
    opacity: float = 0.6
    smooth: bool = False
    percentiles: tuple[float, float] = (0.0, 99.5)
    scale: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"the part of the attention to keep is between 0 and 1, got {self.threshold}")

    @property
    def colormaps(self) -> tuple[str, ...]:
        """Those to choose among, the first of them at first."""
        return tuple(dict.fromkeys([self.colormap, *_COLORMAPS]))

    @property
    def scale_in_words(self) -> str:
        if self.scale is not None:
            low, high = self.scale
            return f"all on one scale, from {low:g} to {high:g} times an even share"
        low, high = self.percentiles
        return f"each picture on its own scale, from percentile {low:g} to percentile {high:g} of the weights"


class Gallery:
    """The page `index.html` beside the outputs of a command.

    Args:
        folder: where the page goes; made where it is missing.
        title: heading of the page.
        note: one line below it, such as the model and its weights; empty: none.
        look: of the pictures.
    """

    def __init__(self, folder: Path, title: str, note: str = "", look: PageLook | None = None) -> None:
        self.folder = folder
        self.title = title
        self.note = note
        self.look = look or PageLook()
        self._most_heads = 0
        self._letters = 0
        self._pictures: list[str] = []
        self._left_out: list[str] = []
        self._videos: list[str] = []

    def add_picture(
        self,
        name: str,
        image: ByteArray,
        maps: FloatArray,
        patch_size: int,
        folder: Path,
        files: Sequence[str] = (),
        *,
        on: Sequence[int] = (),
    ) -> None:
        """Take in a picture with its heads; nothing is kept of the arrays but what the page shows.

        Args:
            name: its heading.
            image: (rows, cols, 3) uint8 RGB, as the network saw it.
            maps: raw weights (heads, rows, cols), one per patch, not negative; what is not finite counts as 0.
            patch_size: side of a patch in pixels.
            folder: where its full-size files lie; the page links to it.
            files: names of those in the folder that it links to as well.
            on: heads that are switched on at first; empty: all.

        Raises:
            ValueError: the maps do not have one value per patch of the image.
        """
        if self._letters > _MOST_LETTERS:
            self._left_out.append(f'<li><a href="{link(folder, self.folder)}/">{escape(name)}</a></li>')
            return
        article = picture_article(name, image, maps, patch_size, on)
        article += f"{self._links(folder, files)}</article>"
        self._most_heads = max(self._most_heads, len(maps))
        self._letters += len(article)
        self._pictures.append(article)

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
            styles=("page.css", "controls.css", "viewer.css", "gallery.css"),
            scripts=("maps.js", "picture.js", "viewer.js", "gallery.js", "videos.js"),
            parts={
                "title": escape(self.title),
                "note": f"<p>{escape(self.note)}</p>" if self.note else "",
                **self._controls(),
                "head_colours": json.dumps([HeadColors().color(head) for head in range(self._most_heads)]),
                "pictures": self._picture_section(),
                "videos": self._video_section(),
                "legend": _LEGEND.format(scale=self.look.scale_in_words) if self._pictures else "",
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
        articles = "\n".join(self._pictures)
        section = f'<section class="pictures" aria-label="Pictures">\n{articles}\n</section>'
        if not self._left_out:
            return section
        return (
            f'{section}\n<section class="part"><h2>More pictures</h2><p>The page would be too large with '
            f"{len(self._left_out)} more, whose files are in these folders:</p><ul>{''.join(self._left_out)}</ul>"
            "</section>"
        )

    def _controls(self) -> dict[str, str]:
        look = self.look
        tables = {name: in_base64(palette(name).tobytes()) for name in look.colormaps}
        return {
            "threshold": str(round(100 * look.threshold)),
            "opacity": str(round(100 * look.opacity)),
            "smooth": " checked" if look.smooth else "",
            "swatches": "".join(_swatch(name, name == look.colormap) for name in look.colormaps),
            "colormaps": json.dumps(tables),
            "scale": json.dumps({"percentiles": look.percentiles, "even": look.scale}),
        }

    def _video_section(self) -> str:
        if not self._videos:
            return ""
        articles = "\n".join(self._videos)
        return f'<section class="part"><h2>Videos</h2>\n{articles}\n</section>'

    def _links(self, folder: Path, files: Sequence[str]) -> str:
        """To the full-size files of a picture."""
        folder_link = f'<a href="{link(folder, self.folder)}/">folder</a>'
        if not files:
            return f'<p class="files">Full-size files: {folder_link}</p>'
        items = [
            f'<li><a href="{link(folder / name, self.folder)}">{escape(name)}</a></li>'
            for name in sorted(files)
        ]
        return (
            f'<details class="files"><summary>Full-size files ({len(items)})</summary>'
            f"<ul>{''.join(items)}</ul><p>All of them lie in this {folder_link}.</p></details>"
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


def _swatch(colormap: str, is_chosen: bool) -> str:
    stops = ",".join(f"rgb{tuple(map(int, colour))}" for colour in palette(colormap)[:: 255 // 8])
    checked = " checked" if is_chosen else ""
    return (
        f'<label title="{colormap}"><input type="radio" name="colormap" value="{colormap}"{checked}>'
        f'<span class="colours" style="background-image:linear-gradient(to right,{stops})"></span>'
        f'<span class="unseen">{colormap}</span></label>'
    )
