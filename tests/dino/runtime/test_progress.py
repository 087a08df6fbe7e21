"""Bars where somebody watches, lines where nobody does, silence for short work."""

import io
import re

import pytest

from dino.runtime import progress as module
from dino.runtime.progress import progress, say


def test_all_items_pass_and_short_work_says_nothing(capsys):
    assert list(progress(range(5), "counting", "item")) == [0, 1, 2, 3, 4]
    assert list(progress(iter("ab"), "spelling", "letter", total=2)) == ["a", "b"]
    assert capsys.readouterr() == ("", "")


def test_lines_go_to_standard_output(capsys):
    for _ in progress(range(2), "counting", "item"):
        say("found one")
    assert capsys.readouterr() == ("found one\nfound one\n", "")


@pytest.mark.parametrize(("total", "shown"), [(None, "counting: 2item ["), (4, "counting:  50% 2/4 [")])
def test_long_work_in_a_pipe_says_whole_lines_now_and_then(total, shown, capsys, monkeypatch):
    now = iter(range(0, 1000, 16))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(now))
    list(progress(iter("abcd"), "counting", "item", total=total))
    said = capsys.readouterr().err
    assert shown in said and "16.00s/item]" in said
    assert len(said.splitlines()) == 2 and said.endswith("\n") and not re.search(r"[\r\x1b]", said)


def test_what_is_inside_of_long_work_says_so_on_lines_of_its_own(capsys, monkeypatch):
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_LINES", 0.0)
    for _ in progress(range(2), "films", "film"):
        list(progress(range(2), "frames", "frame"))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["frames", "frames", "films"] * 2
    assert "2/2" in lines[1] and "2/2" in lines[5]


def test_in_a_terminal_a_bar_is_shown_and_taken_away(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(module.sys, "stderr", terminal)
    monkeypatch.setattr(module, "_SECONDS_BEFORE_A_BAR", 0.0)
    list(progress(range(3), "counting", "item"))
    assert "counting" in terminal.getvalue() and "\n" not in terminal.getvalue()
    assert terminal.getvalue().rpartition("\r")[0].endswith(" "), "blanks over the bar"
