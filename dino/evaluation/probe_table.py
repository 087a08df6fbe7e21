"""The table of linear accuracies: which protocol gave which number."""

from collections.abc import Mapping, Sequence
from typing import Any

Entry = Mapping[str, Any]  # of `results.json`; what it lacks is left empty

_NOTES = {
    "held_out": "held-out: accuracy on the part of train on which the setting was chosen; val is looked at once",
    "at_edge": "!: the best setting was at the end of its grid; beyond it may be a better one",
    "best_top1": "*: at the end; the best epoch, chosen on val as DINO's script does, had {best_top1:.2f}",
    "small_classes": "few pictures per class: mean and standard deviation over {draws} draws",
}


def probe_table(entries: Sequence[Entry]) -> list[str]:
    """Lines in percent.

    Args:
        entries: with `protocol` and `features`, and any of `chosen` (one name and value), `held_out`, `top1`, `top5`,
            `balanced`, `at_edge`, `best_top1`; or, for few pictures per class, `mean`, `spread` and `accuracies`.
    """
    protocol, features = (max(len(entry[key]) for entry in entries) for key in ("protocol", "features"))
    lines = [
        f"{'protocol':<{protocol}}  {'features':<{features}}  {'setting':>9}  {'held-out':>8}  {'top-1':>12}  "
        f"{'top-5':>5}  balanced"
    ]
    for entry in entries:
        settings = "".join(f"{name} {value:.2g}" for name, value in entry.get("chosen", {}).items())
        lines.append(
            f"{entry['protocol']:<{protocol}}  {entry['features']:<{features}}  "
            f"{settings + ('!' if entry.get('at_edge') else ''):>9}  {_percent(entry.get('held_out')):>8}  "
            f"{_top1(entry):>12}  {_percent(entry.get('top5')):>5}  {_percent(entry.get('balanced')):>8}".rstrip()
        )
    return [*lines, *_notes(entries)]


def _top1(entry: Entry) -> str:
    if "spread" in entry:
        return f"{entry['mean']:.2f} ± {entry['spread']:.2f}"
    return f"{entry['top1']:.2f}{'*' if 'best_top1' in entry else ''}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _notes(entries: Sequence[Entry]) -> list[str]:
    notes = []
    for key, note in _NOTES.items():
        told = next(
            (entry for entry in entries if entry.get(key) is not None and entry[key] is not False), None
        )
        if told:
            notes.append(note.format(**{**told, "draws": len(told.get("accuracies", ()))}))
    few = {entry["protocol"]: entry["small_classes"] for entry in entries if entry.get("small_classes")}
    return notes + [
        f"{protocol}: {count} classes have fewer, and gave all" for protocol, count in few.items()
    ]
