import errno
import json
import os
import shlex
import sys
from pathlib import Path

import numpy
import pytest
import torch

from dino.evaluation.results import check_results, provenance, read_results, versions, write_results
from dino.runtime.options import UserError


def test_entries_of_other_names_stay_and_the_same_name_is_replaced(tmp_path):
    write_results(tmp_path, "knn", {"top1": 1.5, "old": True})
    write_results(tmp_path, "linear", {"top1": 2.5})
    path = write_results(tmp_path, "knn", {"top1": 3.5})
    assert path == tmp_path / "results.json"
    found = json.loads(path.read_text())
    assert list(found) == ["knn", "linear"] and found == read_results(tmp_path)
    assert (found["knn"]["top1"], found["linear"]["top1"]) == (3.5, 2.5) and "old" not in found["knn"]


def test_what_another_program_put_there_stays(tmp_path):
    (tmp_path / "results.json").write_text('{"mine": [1, null, "ü"]}', encoding="utf-8")
    write_results(tmp_path, "knn", {})
    assert read_results(tmp_path)["mine"] == [1, None, "ü"]


def test_a_result_says_by_what_it_was_made(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval_knn.py", "--data_path", "my photos/$HOME"])
    write_results(tmp_path, "knn", {"top1": 1.5})
    result = read_results(tmp_path)["knn"]
    assert shlex.split(result["command"]) == ["python", "eval_knn.py", "--data_path", "my photos/$HOME"]
    assert result["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert result["versions"]["numpy"] == numpy.__version__
    assert result["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert result["date"] <= provenance()["date"] and len(result["date"]) == len("2026-01-01 00:00:00")


def test_packages_that_are_not_installed_are_left_out(monkeypatch):
    monkeypatch.setattr("dino.evaluation.results._PACKAGES", ("torch", "no-such-package"))
    assert set(versions()) == {"python", "torch"}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"no JSON", "is no JSON (Expecting value: line 1 column 1 (char 0))"),
        (b"", "is no JSON (Expecting value: line 1 column 1 (char 0))"),
        (b"\xff\xfe{}", "is no JSON ("),
        (b"[1]", "is no file of results"),
        (b'"text"', "is no file of results"),
        (b"null", "is no file of results"),
    ],
)
def test_another_file_of_that_name_is_refused_before_work_and_left_alone(tmp_path, content, problem):
    (tmp_path / "results.json").write_bytes(content)
    for refuse in (check_results, lambda folder: write_results(folder, "knn", {})):
        with pytest.raises(UserError) as refusal:
            refuse(tmp_path)
        sentence = str(refusal.value)
        assert sentence.startswith(f"{tmp_path}/results.json is there and {problem}")
        assert sentence.endswith("; name another --output_dir")
    assert (tmp_path / "results.json").read_bytes() == content
    assert list(tmp_path.iterdir()) == [tmp_path / "results.json"]


def test_a_folder_of_that_name_is_refused_before_work(tmp_path):
    (tmp_path / "results.json").mkdir()
    with pytest.raises(UserError, match=r"results\.json is there and is no JSON .*Is a directory"):
        check_results(tmp_path)


def test_the_folder_is_made_and_a_file_in_its_place_refused(tmp_path):
    check_results(tmp_path / "deep" / "folder")
    assert list((tmp_path / "deep" / "folder").iterdir()) == []
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"^cannot write into --output_dir .*/file: File exists"):
        check_results(tmp_path / "file")


def test_a_disk_that_is_full_leaves_the_results_of_before(tmp_path, monkeypatch):
    path = write_results(tmp_path, "knn", {"top1": 1.5})
    before = path.read_bytes()

    def full(path, text, **_):
        path.write_bytes(text.encode()[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match=r"^cannot write .*results\.json: .*No space left on device"):
        write_results(tmp_path, "linear", {"top1": 2.5})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_result_that_cannot_be_told_in_json_leaves_the_results_of_before(tmp_path):
    path = write_results(tmp_path, "knn", {"top1": 1.5})
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_results(tmp_path, "linear", {"top1": object()})
    assert path.read_bytes() == before


def test_no_results_are_none(tmp_path):
    assert read_results(tmp_path) == {}
