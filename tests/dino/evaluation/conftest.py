"""The commands as a user calls them, in this process and in an empty folder."""

import sys

import pytest


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Runs a command's `main` with arguments; returns what it prints, or its error where it is to end with a code."""
    monkeypatch.chdir(tmp_path)  # where results.json goes

    def call(main, *arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["command.py", *map(str, arguments)])
        if not code:
            main("command.py")
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as stop:
            main("command.py")
        assert stop.value.code == code
        return capsys.readouterr().err

    return call
