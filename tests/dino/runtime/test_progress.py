"""Bars where somebody watches, silence for short work."""

from dino.runtime.progress import progress, say


def test_all_items_pass_and_short_work_says_nothing(capsys):
    assert list(progress(range(5), "counting", "item")) == [0, 1, 2, 3, 4]
    assert list(progress(iter("ab"), "spelling", "letter", total=2)) == ["a", "b"]
    assert capsys.readouterr() == ("", "")


def test_lines_go_to_standard_output(capsys):
    for _ in progress(range(2), "counting", "item"):
        say("found one")
    assert capsys.readouterr() == ("found one\nfound one\n", "")


def test_long_work_in_a_pipe_says_so_now_and_then(capsys, monkeypatch):
    from dino.runtime import progress as module

    monkeypatch.setattr(module, "_SECONDS_BETWEEN_LINES", 0.0)
    list(progress(range(3), "counting", "item"))
    assert "counting" in capsys.readouterr().err
