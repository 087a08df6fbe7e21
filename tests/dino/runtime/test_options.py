import io
import sys
from dataclasses import dataclass

import pytest

from dino.runtime.options import RunStopped, UserError, command, option, parse_options


@dataclass(frozen=True)
class Options:
    epochs: int = option(10, "Passes over the pictures.")
    fast: bool = option(False, "Whether to hurry.")
    crop_scale: tuple[float, float] = option((0.4, 1.0), "Share of the picture.")
    kind: str = option("red", "Colour.", choices=("red", "green"))


def parse(*arguments):
    return parse_options(Options, arguments, prog="prog", description="", default=Options())


def exit_of(monkeypatch, run, *arguments):
    monkeypatch.setattr(sys, "argv", ["prog", *arguments])
    with pytest.raises(SystemExit) as stop:
        command(Options, run, prog="prog", description="")
    return stop.value.code


@pytest.mark.parametrize(
    ("word", "value"),
    [("true", True), ("False", False), ("0", False), ("1", True), ("off", False), ("on", True)],
)
def test_booleans_are_written_as_the_original_writes_them(word, value):
    assert parse("--fast", word).fast is value


@dataclass(frozen=True)
class Probe:
    evaluate: bool = option(False, "Whether to score only.")
    as_stored: bool = option(True, "Whether to leave pictures alone.")
    arch: str = option("auto", "Network.", aliases=("network", "net"))
    crop: str = option("auto", "Whether to crop.", choices=("auto", "true", "false"))
    nb_knn: tuple[int, ...] = option((10,), "Neighbours.")


@pytest.mark.parametrize(
    ("line", "changes"),
    [
        ("", {}),
        ("--evaluate", {"evaluate": True}),
        ("--evaluate --arch a", {"evaluate": True, "arch": "a"}),
        ("--arch a --evaluate", {"evaluate": True, "arch": "a"}),
        ("--evaluate false", {"evaluate": False}),
        ("--evaluate true --arch a", {"evaluate": True, "arch": "a"}),
        ("--evaluate --as-stored false", {"evaluate": True, "as_stored": False}),
        ("--as-stored off --evaluate", {"evaluate": True, "as_stored": False}),
        ("--as_stored --evaluate", {"evaluate": True}),
        ("--nb_knn 1 20 --evaluate --arch a", {"evaluate": True, "nb_knn": (1, 20), "arch": "a"}),
        ("--evaluate=true", {"evaluate": True}),
        ("--no-as-stored --evaluate", {"evaluate": True, "as_stored": False}),
        ("--evaluate --no_as_stored", {"evaluate": True, "as_stored": False}),
        ("--crop --evaluate", {"evaluate": True, "crop": "true"}),
        ("--evaluate --no-crop", {"evaluate": True, "crop": "false"}),
        ("--crop auto", {}),
        ("--network a", {"arch": "a"}),
        ("--net=a", {"arch": "a"}),
    ],
)
def test_the_name_of_a_boolean_alone_means_true(line, changes):
    found = parse_options(Probe, line.split(), prog="prog", description="", default=Probe())
    assert found == Probe(**changes)


def test_help_after_a_boolean_is_help(capsys):
    for word in ("-h", "--help"):
        with pytest.raises(SystemExit) as stop:
            parse_options(Probe, ["--evaluate", word], prog="prog", description="", default=Probe())
        assert stop.value.code in (0, None) and "Whether to score only." in capsys.readouterr().out


@dataclass(frozen=True)
class Compared:
    files: tuple[str, ...] = option((), "Files to compare.", positional=True)
    exact: bool = option(False, "Whether to the last bit.")


def test_positional_options_have_no_name(capsys):
    def compared(*arguments):
        return parse_options(Compared, arguments, prog="prog", description="", default=Compared())

    assert compared("a.json", "b.json", "--exact") == Compared(("a.json", "b.json"), True)
    assert compared("--exact", "true", "a.json") == Compared(("a.json",), True)
    assert compared() == Compared()
    with pytest.raises(UserError, match="Unrecognized options: --files"):
        compared("--files", "a.json")


def test_a_command_without_arguments_runs_with_its_defaults(monkeypatch):
    given = []
    monkeypatch.setattr(sys, "argv", ["prog"])
    command(Options, given.append, prog="prog", description="")
    assert given == [Options()]


def test_hyphens_and_underscores_are_the_same():
    assert parse("--crop-scale", "0.1", "0.2") == parse("--crop_scale", "0.1", "0.2")


class Terminal(io.TextIOWrapper):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--epoch", "3"], "Unrecognized options: --epoch, 3; did you mean --epochs?"),
        (["--zzz"], "Unrecognized options: --zzz"),
        (["stray"], "Unrecognized options: stray"),
        (["--fast", "maybe"], "Error parsing --fast: 'maybe' is neither true nor false"),
        (["--epochs", "1.5"], "Error parsing --epochs: invalid literal for int() with base 10: '1.5'"),
        (["--crop_scale", "0.4"], "Missing value for argument '--crop_scale'. Expected 2 values."),
        (
            ["--kind", "blue"],
            "invalid choice 'blue' for argument '--kind'. Expected one of ('red', 'green').",
        ),
    ],
)
@pytest.mark.parametrize(("stream", "encoding"), [(Terminal, "utf-8"), (io.TextIOWrapper, "ascii")])
def test_a_wrong_option_is_one_sentence_on_any_terminal(arguments, sentence, stream, encoding, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stdout", stream(io.BytesIO(), encoding=encoding))
    with pytest.raises(UserError) as refusal:
        parse(*arguments)
    assert str(refusal.value) == f"{sentence} (--help lists the options)"


def test_a_users_mistake_is_one_sentence_and_exit_code_2(monkeypatch, capsys):
    def run(options):
        raise UserError(f"{options.epochs} epochs are too many")

    assert exit_of(monkeypatch, run, "--epochs", "20") == 2
    assert capsys.readouterr() == ("", "prog: 20 epochs are too many\n")
    assert exit_of(monkeypatch, run, "--epocs", "20") == 2
    assert capsys.readouterr().err.startswith(
        "prog: Unrecognized options: --epocs, 20; did you mean --epochs?"
    )


def test_a_run_that_stops_itself_exits_with_1_and_an_interrupted_one_with_130(monkeypatch, capsys):
    def stop(options):
        raise RunStopped("collapsed")

    def interrupt(options):
        raise KeyboardInterrupt

    assert exit_of(monkeypatch, stop) == 1 and capsys.readouterr().err == "prog: collapsed\n"
    assert exit_of(monkeypatch, interrupt) == 130 and capsys.readouterr().err == "\nprog: interrupted\n"


def test_an_error_of_the_program_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prog"])
    with pytest.raises(ZeroDivisionError):
        command(Options, lambda options: 1 / 0, prog="prog", description="")
