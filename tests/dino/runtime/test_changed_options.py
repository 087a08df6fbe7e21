from argparse import Namespace
from dataclasses import dataclass

from dino.runtime.changed_options import changed_options, changes_line, stored_options


@dataclass(frozen=True)
class Options:
    lr: float = 0.1
    scale: tuple[float, float] = (0.1, 1.0)
    device: str = "cpu"


def test_only_what_differs_and_matters_is_named():
    stored = {"lr": 0.2, "scale": (0.1, 1.0), "device": "cuda", "unknown": 1}
    changed = changed_options(stored, Options(), besides={"device"})
    assert changed == {"lr": (0.2, 0.1)}
    assert changes_line(changed) == "changed:   --lr 0.2 -> 0.1"


def test_the_originals_namespace_and_its_lists_are_read():
    assert stored_options(Namespace(lr=1, scale=[0.1, 1.0])) == {"lr": 1, "scale": (0.1, 1.0)}
    assert stored_options(None) == stored_options([1]) == {}
