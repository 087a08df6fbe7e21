import errno
import os
from pathlib import Path

import pytest

from dino.runtime.files import expanded, make_writable, write_atomically
from dino.runtime.options import UserError
from tests.full_disk import full_disk

NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


def test_a_home_is_found_or_said_to_be_nobodys(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded("~/a", "--input") == tmp_path / "a"
    assert expanded("b/~c", "--input") == Path("b/~c")
    with pytest.raises(UserError, match=r"^--input ~nobody-of-that-name/a: there is no such user"):
        expanded("~nobody-of-that-name/a", "--input")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.txt"
    write_atomically(path, lambda temporary: temporary.write_text("old"))
    return path


def assert_old_and_alone(file):
    assert file.read_text() == "old"
    assert list(file.parent.iterdir()) == [file]


def test_new_content_takes_the_place_of_the_old_and_of_what_a_killed_writer_left(file):
    file.with_name(".a.txt.tmp").write_text("half of something long")
    write_atomically(file, lambda temporary: temporary.write_text("new"))
    assert file.read_text() == "new"
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("place", [(os, "fsync"), (Path, "replace"), (Path, "write_text")])
def test_a_full_disk_leaves_the_old_file_and_no_other(place, file, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(UserError) as refusal:
        patch.setattr(*place, failing(NO_SPACE))
        write_atomically(file, lambda temporary: temporary.write_text("new"))
    assert str(refusal.value) == (
        f"cannot write {file}: [Errno 28] No space left on device; what was there before is unchanged"
    )
    assert_old_and_alone(file)


def test_a_disk_that_is_full_half_way_leaves_the_old_file_and_no_other(file):
    with (
        full_disk(1000),
        pytest.raises(UserError, match="File too large; what was there before is unchanged"),
    ):
        write_atomically(file, lambda temporary: temporary.write_bytes(bytes(2000)))
    assert_old_and_alone(file)


def test_the_systems_reason_is_told_when_torchs_writer_hides_it(file):
    def write(temporary):
        try:
            raise NO_SPACE
        finally:
            raise RuntimeError("unexpected pos 704 vs 598")

    with pytest.raises(UserError, match="No space left on device"):
        write_atomically(file, write)
    with pytest.raises(UserError, match="unexpected pos"):
        write_atomically(file, failing(RuntimeError("unexpected pos")))
    assert_old_and_alone(file)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("a mistake of ours")])
def test_what_is_no_failure_to_write_passes_and_leaves_nothing_either(error, file):
    def write(temporary):
        temporary.write_text("half")
        raise error

    with pytest.raises(type(error)):
        write_atomically(file, write)
    assert_old_and_alone(file)


def test_a_file_in_a_folder_that_is_none_is_one_sentence(file):
    with pytest.raises(UserError, match=r"^cannot write .*/a\.txt/b\.txt: .*Not a directory"):
        write_atomically(file / "b.txt", lambda temporary: temporary.write_text("new"))
    assert_old_and_alone(file)


def test_a_folder_is_made_with_those_above_it_and_stays_empty(tmp_path):
    for _ in range(2):
        make_writable(tmp_path / "a" / "b", "--output_dir")
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize(("below", "reason"), [("run", "Not a directory"), ("", "File exists")])
def test_a_folder_that_cannot_be_made_is_one_sentence(below, reason, file):
    with pytest.raises(UserError) as refusal:
        make_writable(file / below, "--output_dir")
    assert str(refusal.value) == (
        f"cannot write into --output_dir {file / below}: {reason}; name another folder"
    )
    assert_old_and_alone(file)


def test_a_folder_that_takes_no_file_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.TemporaryFile", failing(PermissionError(errno.EACCES, "Permission denied")))
    with pytest.raises(UserError, match=r"into --output_dir .*: Permission denied; name another"):
        make_writable(tmp_path, "--output_dir")
