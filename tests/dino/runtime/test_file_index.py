"""When an index is kept, used, thrown away and done without."""

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from filelock import FileLock

from dino.runtime import file_index
from dino.runtime.file_index import Watch, indexed
from tests.full_disk import full_disk


class Counting:
    """Finds the numbers in a file, and counts how often."""

    finished = 0
    rules = ""

    def __init__(self, file):
        self.watch = Watch()
        self.file = file

    def steps(self):
        self.watch.look(self.file)
        self.numbers = self.file.read_text().split()
        yield from self.numbers
        Counting.finished += 1

    def found(self):
        return {"numbers": np.array([int(number) for number in self.numbers])}


@pytest.fixture
def file(tmp_path):
    Counting.finished = 0
    file = tmp_path / "numbers.txt"
    file.write_text("3 1 2")
    settle()
    return file


def settle():
    """Past the tick of the clock that files are dated by."""
    time.sleep(0.02)


def found(file):
    return indexed([file], Counting(file))["numbers"].tolist()


def index_in(folder):
    (index,) = folder.glob("*.npz")
    return index


def test_what_has_not_changed_is_searched_once(indexes, file, monkeypatch):
    monkeypatch.chdir(file.parent)
    assert found(Path(file.name)) == found(file) == [3, 1, 2]
    monkeypatch.chdir("/")
    assert found(file) == [3, 1, 2]
    assert Counting.finished == 1


def test_a_change_of_the_same_size_with_the_old_date_is_seen(indexes, file):
    before = file.stat()
    found(file)
    file.write_text("3 1 4")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert found(file) == [3, 1, 4]
    settle()
    assert found(file) == [3, 1, 4]
    assert Counting.finished == 2


def test_another_file_in_its_place_is_seen(indexes, file):
    found(file)
    other = file.with_name("other")
    other.write_text("7 8 9")
    settle()
    other.replace(file)
    settle()
    assert found(file) == [7, 8, 9]


def test_a_quick_search_leaves_nothing_behind(indexes, file, monkeypatch):
    monkeypatch.setattr(file_index, "_QUICK", 60)
    assert found(file) == found(file) == [3, 1, 2]
    assert Counting.finished == 2
    assert not indexes.parent.exists()


def test_what_changed_just_now_is_not_trusted(indexes, file, monkeypatch):
    monkeypatch.setattr(file_index, "_TICK", 2_000_000_000)
    assert found(file) == [3, 1, 2]
    assert not list(indexes.glob("*.npz"))
    now = time.time_ns()
    os.utime(file, ns=(now, now - 10_000_000_000))  # whoever sets a time back does it now
    assert found(file) == [3, 1, 2]
    assert not list(indexes.glob("*.npz"))
    monkeypatch.setattr(time, "time_ns", lambda: now + 4_000_000_000)
    found(file)
    assert index_in(indexes).exists()


def test_a_folder_without_times_is_not_trusted(monkeypatch):
    timeless = SimpleNamespace(st_ino=1, st_size=4096, st_mtime_ns=0, st_ctime_ns=0)
    watch = Watch()
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", lambda *_, **__: timeless)
        watch.look("/mount/of/an/object/store")
    assert not watch.certain


@pytest.mark.parametrize("part", ["st_ino", "st_size", "st_mtime_ns", "st_ctime_ns"])
def test_each_part_of_a_state_tells_it_from_another(part, monkeypatch):
    state = {"st_ino": 1, "st_size": 2, "st_mtime_ns": 3, "st_ctime_ns": 4}
    seen = []
    for changed in (state, state, {**state, part: 5}):
        watch = Watch()
        with monkeypatch.context() as patch:
            patch.setattr(os, "stat", lambda *_, now=changed, **__: SimpleNamespace(**now))
            watch.look("/somewhere")
        seen.append(watch.arrays()["states"].tobytes())
    assert seen[0] == seen[1] != seen[2]


def test_copies_at_the_same_place_on_two_hosts_have_an_index_each(indexes, file):
    found(file)
    here = file.rename(file.with_name("here"))
    file.write_text("7 8 9")
    settle()
    assert found(file) == [7, 8, 9]
    assert here.stat().st_ino != file.stat().st_ino
    assert len(list(indexes.glob("*.npz"))) == 2


class _Exploding:
    def __reduce__(self):
        return (Path.touch, (Path(os.environ["EXPLODED"]),))


def _array_alone(index):
    with index.open("wb") as stream:
        np.save(stream, np.arange(3))


def _with_objects(index):
    with np.load(index) as whole:
        np.savez(index, allow_pickle=True, **{**whole, "numbers": np.array([_Exploding()])})


DAMAGE = {
    "empty": lambda index: index.write_bytes(b""),
    "cut": lambda index: index.write_bytes(index.read_bytes()[:-30]),
    "half": lambda index: index.write_bytes(index.read_bytes()[: index.stat().st_size // 2]),
    "foreign": lambda index: index.write_bytes(b"something else entirely"),
    "an array alone": _array_alone,
    "others' arrays": lambda index: np.savez(index, a=np.arange(3)),
    "a pickle": lambda index: index.write_bytes(pickle.dumps(_Exploding())),
    "pickled objects": _with_objects,
    "a folder": lambda index: (index.unlink(), index.mkdir()),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_index_is_made_again_and_runs_no_code(indexes, file, kind, monkeypatch, tmp_path):
    monkeypatch.setenv("EXPLODED", str(tmp_path / "exploded"))
    found(file)
    DAMAGE[kind](index_in(indexes))
    assert found(file) == found(file) == [3, 1, 2]
    assert Counting.finished == (3 if kind == "a folder" else 2)
    assert not (tmp_path / "exploded").exists()


def test_every_flipped_byte_of_what_was_found_is_noticed(indexes, file):
    found(file)
    index = index_in(indexes)
    whole = index.read_bytes()
    start = whole.index(np.array([3, 1, 2]).tobytes())
    for place in range(start, start + 24):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        index.write_bytes(damaged)
        assert found(file) == [3, 1, 2]
    assert Counting.finished == 25


def test_the_index_of_another_version_is_not_used(indexes, file, monkeypatch):
    found(file)
    monkeypatch.setattr(file_index, "_FORMAT", 999)
    assert found(file) == found(file) == [3, 1, 2]
    assert Counting.finished == 2


def test_what_was_found_by_other_rules_is_not_used(indexes, file, monkeypatch):
    found(file)
    monkeypatch.setattr(Counting, "rules", "others")
    assert found(file) == found(file) == [3, 1, 2]
    assert Counting.finished == 2


def test_only_the_indexes_used_last_are_kept(indexes, file, monkeypatch):
    monkeypatch.setattr(file_index, "_MOST_KEPT", 2)
    others = [file.with_name(name) for name in "ab"]
    for other in others:
        other.write_text("5")
    settle()
    for one in (file, others[0], file, others[1]):
        found(one)
        settle()
    assert len(list(indexes.glob("*.npz"))) == 2
    finished = Counting.finished
    found(file), found(others[1])
    assert Counting.finished == finished == 3
    found(others[0])
    assert Counting.finished == 4


def test_where_nothing_can_be_written_nothing_is_kept(file, indexes, monkeypatch):
    indexes.parent.write_text("a file where the folder should be")
    assert found(file) == found(file) == [3, 1, 2]
    assert Counting.finished == 2


def test_a_full_disk_stops_nothing(file, indexes):
    with full_disk(500):
        assert found(file) == [3, 1, 2]
    assert [path.suffix for path in indexes.iterdir()] == [".lock"]


def test_without_a_cache_folder_nothing_is_kept(file, indexes, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", str(file.parent / "home"))
    assert found(file) == found(file)
    assert Counting.finished == 1
    assert index_in(file.parent / "home" / ".cache" / "dino-xcit" / "indexes").exists()

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert found(file) == [3, 1, 2]
    assert Counting.finished == 2


@pytest.mark.parametrize("error", [PermissionError(13, "no"), NotImplementedError("no flock here")])
def test_without_a_lock_the_search_is_made_and_not_kept(file, indexes, monkeypatch, error):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(FileLock, "acquire", refuse)
    assert found(file) == found(file) == [3, 1, 2]
    assert Counting.finished == 2
    assert not list(indexes.glob("*.npz"))


def test_one_that_hangs_is_not_waited_for_for_ever(file, indexes, monkeypatch):
    found(file)
    lock = FileLock(index_in(indexes).with_suffix(".lock"))
    index_in(indexes).unlink()
    monkeypatch.setattr(file_index, "_PATIENCE", 0.1)
    with lock:
        assert found(file) == [3, 1, 2]
    assert not list(indexes.glob("*.npz"))


_SEARCH = """
    import os, sys, time
    from pathlib import Path
    import numpy as np
    from dino.runtime import file_index
    file_index._QUICK, file_index._TICK = 0.05, 0
    folder = Path(sys.argv[1])

    class Slow:
        rules, watch = "", file_index.Watch()
        def steps(self):
            self.watch.look(folder / "data")
            for _ in range(20):
                with (folder / "steps").open("a") as log:
                    log.write(f"{os.getpid()}\\n")
                time.sleep(0.06)
                yield
            with (folder / "finished").open("a") as log:
                log.write("x")
        def found(self):
            return {"answer": np.arange(5)}

    print(file_index.indexed([folder / "data"], Slow())["answer"].tolist())
"""


def start_search(folder):
    command = [sys.executable, "-c", textwrap.dedent(_SEARCH), str(folder)]
    root = Path(__file__).parents[3]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root)


def test_of_processes_at_once_one_searches_to_the_end(indexes, tmp_path):
    (tmp_path / "data").touch()
    searching = [start_search(tmp_path) for _ in range(3)]
    answers = [process.communicate(timeout=60) for process in searching]
    assert answers == [("[0, 1, 2, 3, 4]\n", "")] * 3
    assert (tmp_path / "finished").read_text() == "x"


def test_a_search_that_was_killed_blocks_nobody(indexes, tmp_path):
    (tmp_path / "data").touch()
    first = start_search(tmp_path)
    while not (tmp_path / "steps").exists() or len((tmp_path / "steps").read_text().split()) < 3:
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=60)
    second = start_search(tmp_path)
    assert second.communicate(timeout=60) == ("[0, 1, 2, 3, 4]\n", "")
    assert (tmp_path / "finished").read_text() == "x"
    assert index_in(indexes).exists()


def test_the_index_of_another_user_is_not_used(indexes, file, monkeypatch):
    assert found(file) == [3, 1, 2] and Counting.finished == 1
    monkeypatch.setattr(os, "getuid", lambda: os.geteuid() + 1)
    assert found(file) == [3, 1, 2] and Counting.finished == 2
