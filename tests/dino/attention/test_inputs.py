"""What words of a user stand for, and where the outputs of each go."""

import json
import re
from pathlib import Path

import pytest

from dino.attention.inputs import Input, find_inputs
from dino.attention.record import RECORD
from dino.runtime.options import UserError


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def touch(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()


def found(*places: str, out: str = "out", **options) -> list[tuple[str, str, str]]:
    """(kind, place, folder) of each."""
    return [(each.kind, each.place, str(each.folder)) for each in find_inputs(places, Path(out), **options)]


def names(*places: str, out: str = "out") -> list[str]:
    return [each.name for each in find_inputs(places, Path(out))]


def test_a_single_one_has_its_outputs_in_the_folder_itself():
    touch("a.jpg", "b.MP4")
    assert found("a.jpg") == [("picture", "a.jpg", "out")]
    assert found("b.MP4") == [("video", "b.MP4", "out")]
    assert found("0") == [("camera", "0", "out")]
    assert found("https://host/x/my%20cat.png?size=2") == [
        ("picture", "https://host/x/my%20cat.png?size=2", "out")
    ]
    assert found("https://host/clip.webm")[0][0] == "video"


def test_what_was_found_in_a_folder_keeps_its_tree_even_alone():
    touch("in/deep/a.jpg", "in/notes.txt", "in/.hidden.png")
    assert found("in") == [("picture", "in/deep/a.jpg", "out/deep/a")]
    touch("in/clip.mkv")
    assert found("in") == [("video", "in/clip.mkv", "out/clip"), ("picture", "in/deep/a.jpg", "out/deep/a")]


def test_several_words_are_drawn_in_their_order_and_never_into_one_folder():
    touch("a.png", "a.jpg", "x/a.png", "b.png")
    assert [folder for *_, folder in found("b.png", "a.png", "a.jpg", "x/a.png", "b.png")] == [
        "out/b.png",
        "out/a.png",
        "out/a.jpg",
        "out/a.png-2",
        "out/b.png-2",
    ]


def test_what_a_flag_names_wrongly_is_told_by_the_name_of_the_flag():
    for options in ({"frame_folders": ["gone"]}, {"frame_folders": ["~nobody-there/x"]}):
        with pytest.raises(UserError, match=r"^--input_path "):
            find_inputs([], Path("out"), **options)
    with pytest.raises(UserError, match=r"^--image_path: cannot read x+: File name too long"):
        find_inputs(["x" * 300], Path("out"), option="--image_path")


@pytest.mark.parametrize("name", ["img.png", "attn-head12.png", "mask_th0.6_mean.png", "video.mp4"])
def test_a_single_one_is_not_overwritten_by_its_outputs(name: str):
    touch(f"out/{name}", "out/photo.png")
    Path("link.png").symlink_to(f"out/{name}")
    Path("folder").symlink_to("out")
    for place in (f"out/{name}", "link.png", f"folder/{name}"):
        with pytest.raises(UserError, match=f"{place} would be overwritten by an output"):
            found(place)
        assert found(place, out="elsewhere")[0][2] == "elsewhere"
    assert found("out/photo.png")[0][2] == "out"


def test_no_outputs_go_into_a_folder_with_an_input_of_their_names():
    touch("a.png", "a/img.png", "b.png", "b/holiday.png", "index.html.png", "attention.json.jpg")
    Path("index.html").touch()
    assert [(place, folder) for _, place, folder in found(".", out=".")] == [
        ("a/img.png", "a/img"),
        ("a.png", "a-2"),
        ("attention.json.jpg", "attention.json-2"),
        ("b/holiday.png", "b/holiday"),
        ("b.png", "b"),
        ("index.html.png", "index.html-2"),
    ]


def test_upper_and_lower_case_are_one_name_on_some_systems():
    touch("in/a.png", "in/A.png", "in/b")
    touch("out/B")
    assert [folder for *_, folder in found("in")] == ["out/A", "out/a-2"]
    touch("in/B.png")
    assert ("picture", "in/B.png", "out/B-2") in found("in"), "a file is in the way"


def test_frames_that_were_drawn_are_no_pictures():
    touch("in/clip.mp4", "in/clip/video/0001.png", "in/clip/video/0002.png", "in/clip/mine/3.png")
    Path("in/clip", RECORD).write_text(json.dumps({"files": ["video"]}))
    assert names("in") == ["clip/mine/3.png", "clip.mp4"]


@pytest.mark.parametrize(
    ("name", "title"),
    [("a/ü b.png", "ü b.png"), ("two\nlines\x1b.png", "two?lines?.png"), ("caf\udce9.png", "caf?.png")],
)
def test_titles_can_be_printed(name: str, title: str):
    shown = Input("picture", name, name, Path("out")).title
    assert shown == title and shown.encode("utf-8")


def test_a_folder_of_frames_is_one_video():
    touch("frames/1.jpg", "frames/2.jpg", "clip.mp4")
    assert [each.kind for each in find_inputs([], Path("out"), frame_folders=["frames"])] == ["frames"]
    assert [each.kind for each in find_inputs([], Path("out"), frame_folders=["clip.mp4"])] == ["video"]


def test_a_file_that_is_called_like_a_camera_or_a_pattern_is_a_file():
    touch("a[1].png")
    Path("0").mkdir()
    touch("0/b.png")
    assert found("a[1].png") == [("picture", "a[1].png", "out")]
    assert found("0")[0][:2] == ("picture", "0/b.png")


@pytest.mark.parametrize("pattern", ["**.png", "*", "{a,b}.png", "**/*.*"])
def test_a_pattern_takes_visible_pictures_and_videos_only(pattern: str):
    touch("a.png", "b.png", "._a.png", "notes.txt")
    assert names(pattern) == ["a.png", "b.png"]


def test_pictures_of_one_stem_do_not_overwrite_each_other():
    touch("x/a.png", "x/a.jpg", "y/b.png", "y/c.png")
    assert found("*/[ab].*") == [
        ("picture", "x/a.jpg", "out/x/a.jpg"),
        ("picture", "x/a.png", "out/x/a.png"),
        ("picture", "y/b.png", "out/y/b"),
    ]


@pytest.mark.parametrize("place", [".", "**/*.*"])
def test_a_second_run_draws_what_the_first_one_drew(place: str):
    touch("a.png", "img.png", "photos/b.png", "photos/sheet.png", "clip.mp4", "video.mp4")
    first = found(place, out=".")
    for *_, folder in first:
        touch(f"{folder}/img.png", f"{folder}/video.mp4", f"{folder}/mine.png")
        Path(folder, RECORD).write_text(json.dumps({"files": ["img.png", "video.mp4"]}))
    second = found(place, out=".")
    assert set(first) <= set(second)
    assert {Path(where).name for _, where, _ in set(second) - set(first)} == {"mine.png"}


@pytest.mark.parametrize("text", ["", "[]", '{"files": 3}', '{"no": 1}', "\x00"])
def test_a_record_that_is_none_hides_nothing(text: str):
    touch("in/img.png")
    Path("in", RECORD).write_text(text)
    assert names("in") == ["img.png"]


def test_what_lies_in_an_output_folder_is_not_drawn_however_it_is_written(here: Path):
    touch("in/a.png", "in/out/b.png")
    Path("link").symlink_to("in")
    for place, out in (("in", "link/out"), ("link", "in/out"), ("in/../in", str(here / "in" / "out"))):
        assert names(place, out=out) == ["a.png"]


@pytest.mark.parametrize(
    ("places", "sentence"),
    [
        ([], "--input is missing: name a picture, a video"),
        (["nowhere/b.png"], "--input nowhere/b.png: no such file or folder"),
        (["*.jpg"], "*.jpg: no pictures or videos fit this pattern"),
        (["{a,b}.png"], "b.png, which {a,b}.png stands for, does not exist"),
        (["empty"], "no pictures or videos in this folder or below it"),
        (["a.png", "gone.png"], "gone.png: no such file or folder"),
    ],
)
def test_nothing_to_draw_is_one_sentence(places: list[str], sentence: str):
    touch("a.png")
    Path("empty").mkdir()
    with pytest.raises(UserError, match=re.escape(sentence)):
        find_inputs(places, Path("out"))
