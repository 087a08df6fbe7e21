"""Features on disk: when they are taken from there, and what is done about all that can be wrong with them."""

import errno
import json
import os
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino.evaluation import feature_cache
from dino.evaluation.extraction import Extractor, Preparation
from dino.evaluation.feature_cache import Origin, cached_features
from dino.evaluation.kinds import CLASS_TOKEN, PATCH_MEAN, PATCH_TOKENS
from dino.runtime.backbones import create_backbone, tensors_sha256
from dino.runtime.fingerprint import fingerprint
from dino.runtime.options import UserError
from dino.runtime.pictures import open_pictures
from tests.dino.small_runs import Killed, write_pictures

KINDS = (CLASS_TOKEN, PATCH_MEAN)


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return create_backbone("xcit_pico_3_p8")


@pytest.fixture
def photos(tmp_path):
    return write_pictures(tmp_path / "photos", count=5)


@pytest.fixture
def cache(tmp_path, backbone, photos):
    """The features of the pictures as they are now, by way of a folder; what is said goes to `.said`."""

    class Cache:
        def __init__(self):
            self.folder, self.said = tmp_path / "cache", []

        def __call__(self, kinds=KINDS, *, backbone=backbone, path=photos, as_stored=False, **preparation):
            self.said.clear()
            pictures = open_pictures(str(path))
            pictures.as_stored = as_stored
            preparation = Preparation(**{"size": 16, **preparation})
            origin = Origin("xcit_pico_3_p8", tensors_sha256(backbone), "random", None)
            return cached_features(
                self.folder,
                "val",
                Extractor(backbone, preparation, batch_size=3),
                pictures,
                kinds,
                origin=origin,
                data=fingerprint(pictures),
                say=self.said.append,
            )

        def places(self):
            return sorted(place for place in self.folder.iterdir() if place.name.startswith("val-"))

        def place(self):
            (place,) = self.places()
            return place

    return Cache()


@pytest.fixture
def forbidden(monkeypatch):
    """No forward pass from here on, not even an empty one."""

    def forbid():
        def fail(*_, **__):
            raise AssertionError("the backbone was shown a picture")

        monkeypatch.setattr(Extractor, "run", fail)

    return forbid


def assert_same_features(found, expected):
    assert found.rows.keys() >= expected.rows.keys()
    for kind, rows in expected.rows.items():
        np.testing.assert_array_equal(found[kind], rows)
    np.testing.assert_array_equal(found.labels, expected.labels)
    assert (found.names, found.broken) == (expected.names, expected.broken)


def half_made(cache):
    return [path for path in cache.folder.rglob("*") if path.name.endswith((".tmp", ".packed"))]


def test_what_comes_from_disk_is_what_the_extractor_gives(cache, backbone, photos):
    features = cache()
    expected = Extractor(backbone, Preparation(size=16), batch_size=3).extract(open_pictures(str(photos)))
    assert_same_features(features, expected)
    stored = {path.name for path in cache.place().iterdir()}
    assert stored == {"cls.npy", "patch_mean.npy", "labels.npy", "names.json", "features.json"}
    assert np.load(cache.place() / "labels.npy").tolist() == [0] * 5 + [1] * 5
    assert json.loads((cache.place() / "names.json").read_text()) == expected.names
    assert cache.said == [] and not half_made(cache)


def test_the_second_time_no_picture_is_shown_and_it_says_so(cache, forbidden):
    first = cache()
    forbidden()
    assert_same_features(cache(), first)
    (line,) = cache.said
    assert line.startswith(
        f"val features: reused from {cache.place()} (10 pictures, by torch {torch.__version__.partition('+')[0]} on "
    )
    assert cache((PATCH_MEAN,)).rows.keys() == {PATCH_MEAN}


def test_other_weights_pictures_or_preparation_are_other_features(cache, photos):
    cache()
    torch.manual_seed(1)
    other = create_backbone("xcit_pico_3_p8")
    for number, change in enumerate(
        (
            {"backbone": other},
            {"size": 24},
            {"resize_ratio": 1.0},
            {"precision": "bf16"},
            {"as_stored": True},
            {"path": photos / "cats"},
        ),
        start=2,
    ):
        cache(**change)
        assert len(cache.places()) == number and not cache.said, change


def test_a_file_rewritten_with_as_many_bytes_makes_other_features(cache, photos):
    picture = photos / "cats" / "uncompressed.bmp"
    Image.new("RGB", (20, 20), "red").save(picture)
    size, first = picture.stat().st_size, cache()
    Image.new("RGB", (20, 20), "blue").save(picture)
    assert picture.stat().st_size == size
    second = cache()
    assert len(cache.places()) == 2 and not cache.said
    assert [bool((a != b).any()) for a, b in zip(first["cls"], second["cls"], strict=True)] == (
        [name == str(picture) for name in first.names]
    )


def test_moved_pictures_keep_their_features_and_get_their_names_of_today(cache, photos, forbidden):
    (photos / "dogs" / "2.png").write_bytes(b"no picture")
    first = cache()
    forbidden()
    moved = photos.rename(photos.with_name("moved"))
    again = cache(path=moved)
    assert again.names == [name.replace("/photos/", "/moved/") for name in first.names]
    assert again.broken == [f"{moved}/dogs/2.png: not a picture that Pillow can read"]


def test_more_kinds_than_are_stored_are_extracted_beside_them(cache, forbidden):
    first = cache((CLASS_TOKEN,))
    more = cache((PATCH_TOKENS, PATCH_MEAN))
    assert cache.said == [f"val features: {cache.place()} lacks patch_tokens, patch_mean: extracting again"]
    assert more[PATCH_TOKENS].shape == (10, 4, 96)
    forbidden()
    assert_same_features(cache((PATCH_MEAN, CLASS_TOKEN)), first)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def folder_of_that_name(path):
    path.unlink()
    path.mkdir()


FILES = ("cls.npy", "labels.npy", "names.json", "features.json")


@pytest.mark.parametrize("damage", [cut, flip, empty, Path.unlink, folder_of_that_name])
@pytest.mark.parametrize("name", FILES)
def test_what_is_damaged_is_made_again_and_said(cache, name, damage):
    first = cache()
    expected = {kind: np.array(rows) for kind, rows in first.rows.items()}
    damage(cache.place() / name)
    again = cache()
    (line,) = cache.said
    assert line.startswith(f"val features: {cache.place()} is damaged ({name}") and "extracting again" in line
    for kind, rows in expected.items():
        np.testing.assert_array_equal(again[kind], rows)
    assert cache() and "reused" in cache.said[0]


def test_every_flipped_byte_of_the_record_is_noticed(cache):
    cache()
    record = cache.place() / "features.json"
    whole = record.read_bytes()
    unnoticed = []
    for place in range(0, len(whole), 7):
        changed = bytearray(whole)
        changed[place] ^= 1
        record.write_bytes(changed)
        try:
            content = feature_cache._read_record(cache.place())
        except feature_cache._DamagedError:
            continue
        record.write_bytes(whole)
        if content != feature_cache._read_record(
            cache.place()
        ):  # a space between two values may become a tab
            unnoticed.append(place)
    assert unnoticed == []


def test_a_damaged_array_that_nobody_asks_for_stands_in_nobodys_way(cache, forbidden):
    first = cache()
    cut(cache.place() / "patch_mean.npy")
    forbidden()
    np.testing.assert_array_equal(cache((CLASS_TOKEN,))[CLASS_TOKEN], first[CLASS_TOKEN])


def test_what_a_killed_writer_left_is_neither_taken_nor_in_the_way(cache):
    expected = cache()
    place = cache.place()
    half = place.with_name(f".{place.name}.tmp")
    shutil.move(place, half)
    (half / "foreign.npy").write_bytes(b"")
    assert_same_features(cache(), expected)
    assert not cache.said and not half.exists() and not (place / "foreign.npy").exists()


@pytest.mark.parametrize("rows_per_block", [1, 2, 3, 4096])
@pytest.mark.parametrize(
    "broken", [("cats/0",), ("dogs/4",), ("cats/1", "cats/2", "dogs/0"), ("cats/0", "cats/2", "dogs/4")]
)
def test_broken_pictures_leave_no_gaps(cache, photos, backbone, broken, rows_per_block, monkeypatch):
    monkeypatch.setattr(feature_cache, "_ROWS_PER_BLOCK", rows_per_block)
    for name in broken:
        (photos / f"{name}.png").write_bytes(b"no picture")
    kinds = (CLASS_TOKEN, PATCH_TOKENS)
    features = cache(kinds)
    pictures = open_pictures(str(photos))
    assert_same_features(
        features, Extractor(backbone, Preparation(size=16), batch_size=3).extract(pictures, kinds)
    )
    assert features.broken == [f"{photos}/{name}.png: not a picture that Pillow can read" for name in broken]
    count = 10 - len(broken)
    assert len(features.names) == len(features.labels) == len(features[CLASS_TOKEN]) == count
    file = cache.place() / "patch_tokens.npy"
    assert file.stat().st_size == np.load(file, mmap_mode="r").offset + count * 4 * 96 * 4


def test_nothing_but_broken_pictures_leaves_nothing(cache, photos):
    for file in photos.rglob("*.png"):
        file.write_bytes(b"no picture")
    with pytest.raises(
        UserError, match=r"^none of the 10 pictures can be read; .*cats/0\.png: not a picture"
    ):
        cache()
    assert not cache.places() and not half_made(cache)


def test_pictures_without_classes_have_no_labels(cache, photos, forbidden):
    features = cache(path=photos / "cats")
    assert features.labels is None and len(features.names) == 5
    assert not (cache.place() / "labels.npy").exists()
    forbidden()
    assert cache(path=photos / "cats").labels is None


# Disks


def test_a_disk_that_is_too_small_is_told_before_the_first_picture(cache, photos, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=15_000))
    monkeypatch.setattr(Extractor, "fill", lambda *_, **__: pytest.fail("pictures were read"))
    sentence = (
        rf"^the features of 10 pictures need 0\.0 MB in {cache.folder}, where 0\.0 MB are free; name another folder "
        r"with --features_dir$"
    )
    with pytest.raises(UserError, match=sentence):
        cache((CLASS_TOKEN, PATCH_TOKENS))
    assert not cache.places() and not half_made(cache)


def test_no_room_at_the_time_of_allocating_is_one_sentence_and_leaves_nothing(cache, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=rf"^cannot write {cache.folder}/val-\w+: No space left on device$"):
        cache()
    assert not cache.places() and not half_made(cache)


def test_a_disk_that_is_really_full_is_one_sentence_and_leaves_nothing(cache, monkeypatch):
    cache.folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(cache.folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        usage = shutil.disk_usage("/")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**12))
        with pytest.raises(UserError, match="No space left on device"):
            cache((PATCH_TOKENS,))
        assert not cache.places() and not half_made(cache)
    finally:
        subprocess.run(["umount", str(cache.folder)], check=True)


def test_a_folder_that_cannot_be_written_is_one_sentence(cache):
    cache.folder.write_text("mine")
    sentence = rf"^cannot write into --features_dir {cache.folder}: File exists; name another folder$"
    with pytest.raises(UserError, match=sentence):
        cache()
    assert cache.folder.read_text() == "mine"


@pytest.mark.parametrize("reason", [Killed, UserError, RuntimeError])
def test_what_is_cut_off_in_the_middle_is_not_taken_for_features(cache, reason, monkeypatch):
    run, calls = Extractor.run, iter(range(3))  # the first shows an empty picture

    def cut_off(self, images, function):
        if next(calls, None) is None:
            raise reason("cut off")
        return run(self, images, function)

    monkeypatch.setattr(Extractor, "run", cut_off)
    with pytest.raises(reason):
        cache()
    assert not cache.places() and not half_made(cache)
    monkeypatch.undo()
    assert len(cache()[CLASS_TOKEN]) == 10 and not cache.said


def test_a_second_evaluation_waits_for_the_first_and_takes_its_features(cache, monkeypatch):
    fill, started, go_on = Extractor.fill, threading.Event(), threading.Event()

    def slow(*arguments, **options):
        started.set()
        assert go_on.wait(30)
        return fill(*arguments, **options)

    monkeypatch.setattr(Extractor, "fill", slow)
    first = threading.Thread(target=cache)
    first.start()
    assert started.wait(30)
    monkeypatch.setattr(Extractor, "fill", lambda *_, **__: pytest.fail("they were made twice"))
    found = []
    second = threading.Thread(target=lambda: found.append(cache()))
    second.start()
    while not cache.said:
        assert second.is_alive()
    assert cache.said[0].startswith("val features: waiting for another evaluation, which makes them in ")
    go_on.set()
    first.join(30)
    second.join(30)
    assert len(found[0].names) == 10 and "reused" in cache.said[-1]
