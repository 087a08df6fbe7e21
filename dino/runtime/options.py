"""Command lines from frozen dataclasses: each option is written once, with its default, unit and "off" value.

Imports no torch, so that `--help` answers at once.
"""

import dataclasses
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from itertools import dropwhile, takewhile
from typing import Annotated, Any, Literal, NoReturn, TypeVar, cast, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

Options = TypeVar("Options")

# What options say instead of a name: find out by yourself; a network without weights, as a baseline.
AUTO = "auto"
RANDOM = "random"

_TRUE = {"true", "1", "on", "yes"}
_FALSE = {"false", "0", "off", "no"}

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class UserError(ValueError):
    """A user's mistake: the command prints the sentence and exits with code 2, without a traceback."""

    exit_code = 2


class RunStopped(Exception):  # noqa: N818 - not an error of the program or the user
    """Long work that ended early for a stated reason: one sentence and exit code 1."""

    exit_code = 1


class RankFailed(RunStopped):
    """What ended one process of several and is unknown to the others: that process says it, whichever it is."""


class Interrupted(RunStopped):
    """A signal asked the run to end, and it saved first: whoever sent it should start the same command again."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: a failure for now, try again later


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    positional: bool = False,
    aliases: Sequence[str] = (),
) -> Any:
    """A dataclass field for one command-line option.

    Args:
        default: value when the option is not given.
        help: what it does, with its unit and the value that turns it off.
        choices: the words allowed, when there are only some.
        positional: it is given by its place, without a name.
        aliases: other names, without hyphens before them.
    """
    metadata = {
        "help": help,
        "choices": tuple(choices),
        "positional": positional,
        "aliases": tuple(f"--{name}" for name in aliases),
    }
    return dataclasses.field(default=default, metadata=metadata)


def command(
    options: type[Options],
    run: Callable[[Options], None],
    *,
    prog: str,
    description: str,
    defaults: Callable[[Sequence[str]], Options] | None = None,
) -> None:
    """Parse `sys.argv` into `options` and call `run`; a `UserError` becomes one sentence and exit code 2.

    Args:
        defaults: given the arguments, the values of the options that they do not name (for presets).
    """
    arguments = sys.argv[1:]
    try:
        start = defaults(arguments) if defaults else options()
        run(parse_options(options, arguments, prog=prog, description=description, default=start))
    except (UserError, RunStopped) as reason:
        _exit(prog, str(reason), code=reason.exit_code)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None


def parse_options(
    options: type[Options], arguments: Sequence[str], *, prog: str, description: str, default: Options
) -> Options:
    """The options that `arguments` name, the rest from `default`.

    Booleans are written `true` or `false`, a name alone is true, and false with `no_` before it; hyphens and
    underscores in names are the same.

    Raises:
        UserError: an unknown name or an impossible value.
    """
    form = _form(options)
    messages = io.StringIO()
    try:
        with redirect_stderr(messages):
            filled = tyro.cli(
                form,
                prog=prog,
                description=description,
                args=_with_values(options, arguments),
                default=form(**_values(default)),
                use_underscores=True,
                config=(tyro.conf.FlagConversionOff,),
                registry=_registry(),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_one_sentence(messages.getvalue())) from None
    return options(**_values(filled))


def _values(instance: Any) -> dict[str, Any]:
    return {field.name: getattr(instance, field.name) for field in dataclasses.fields(instance)}


def _form(options: type[Any]) -> type[Any]:
    """The same fields with their help and choices where tyro looks for them: in the annotation."""
    hints = get_type_hints(options)
    fields: list[tuple[str, Any, Any]] = []
    for field in dataclasses.fields(options):
        choices = field.metadata.get("choices")
        kind: Any = Literal[choices] if choices else hints[field.name]
        words = {"help": field.metadata.get("help", ""), "aliases": field.metadata.get("aliases") or None}
        described: Any = Annotated[kind, tyro.conf.arg(**words)]
        if field.metadata.get("positional"):
            described = cast(Any, tyro.conf.Positional)[described]
        fields.append((field.name, described, dataclasses.field(default=field.default)))
    return dataclasses.make_dataclass(options.__name__, fields, frozen=True)


def _with_values(options: type[Any], arguments: Sequence[str]) -> list[str]:
    """`--evaluate --no-model-ema` as `--evaluate true --model_ema false`: all are in use among the originals."""
    names = [f"--{name}" for name in _yes_or_no(options)]
    negations = {f"--no_{name[2:]}": name for name in names}
    written: list[str] = []
    for argument, following in zip(arguments, [*arguments, "--"][1:], strict=True):
        name = argument.replace("-", "_").replace("__", "--", 1)
        if name in negations:
            written += [negations[name], "false"]
            continue
        written.append(argument)
        if name in names and following.startswith("-"):
            written.append("true")
    return written


def _yes_or_no(options: type[Any]) -> list[str]:
    """Options that take true and false, perhaps among other words."""
    kinds = get_type_hints(options)
    choices = {field.name: field.metadata.get("choices", ()) for field in dataclasses.fields(options)}
    return [
        name
        for name, kind in kinds.items()
        if kind is bool or {"true", "false"} <= set(choices.get(name, ()))
    ]


def _registry() -> ConstructorRegistry:
    """Booleans as DINO's scripts write them: `--norm_last_layer false`."""
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def boolean(kind: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[bool] | None:
        if kind.type is not bool:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="{true,false}",
            instance_from_str=lambda words: _boolean(words[0]),
            is_instance=lambda value: isinstance(value, bool),
            str_from_instance=lambda value: [str(value).lower()],
        )

    return registry


def _boolean(word: str) -> bool:
    if word.lower() not in _TRUE | _FALSE:
        raise ValueError(f"'{word}' is neither true nor false")
    return word.lower() in _TRUE


def _one_sentence(message: str) -> str:
    """tyro's framed message without the frame: what is wrong, and the nearest names when it offers some."""
    plain = _COLOURS.sub("", message)  # written whenever standard output is a terminal
    _heading, *lines = [line.strip("│ ") for line in plain.strip().splitlines()]
    problem = list(takewhile(lambda line: not _is_rule(line), dropwhile(_is_rule, lines)))
    sentence = " ".join(problem)
    nearest = [line.split()[0] for line in lines if line.startswith("--") and not _is_rule(line)]
    if sentence.startswith("Unrecognized") and nearest:
        sentence += f"; did you mean {', '.join(dict.fromkeys(nearest))}?"
    return f"{sentence} (--help lists the options)"


def _is_rule(line: str) -> bool:
    return set(line) <= set("─-╰╯")


def _exit(prog: str, sentence: str, *, code: int) -> NoReturn:
    print(f"{prog}: {sentence}", file=sys.stderr)
    raise SystemExit(code)
