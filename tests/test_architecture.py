"""The rules of the house: who may import whom, what an import may do, how long a file may be."""

import ast
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LONGEST_FILE = 400

# From the ground up: a module imports its own floor and those below it.
FLOORS = [
    ["xcit"],
    ["dino.runtime"],
    ["dino.video"],
    [
        "dino." + name
        for name in (
            *(
                "multicrop",
                "distortions",
                "batched_distortions",
                "network",
                "head",
                "loss",
                "teacher",
                "schedules",
                "optimizer",
                "collapse",
            ),
            *(
                "step_result",
                "copies",
                "distillation",
                "nonfinite",
                "loader",
                "feed",
                "prefetch",
                "memory",
                "presets",
                "train_options",
            ),
        )
    ],
    ["dino.evaluation", "dino.attention", "dino.curves"],
    ["dino.monitor"],
    ["dino." + name for name in ("plan", "resume", "summary", "pretraining")],
    ["dino.train", "dino.downstream"],
    ["dino.slurm", "dino.slurm_job", "dino.slurm_options"],
]


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {
    module_name(path): path for folder in ("xcit", "dino") for path in sorted((ROOT / folder).rglob("*.py"))
}
PYTHON_FILES = [*SOURCES.values(), *sorted((ROOT / "tests").rglob("*.py")), *sorted(ROOT.glob("*.py"))]


def imports(module):
    """Modules that a module names in its import statements, wherever they stand."""
    found = set()
    for node in ast.walk(ast.parse(SOURCES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            # `from dino import schedules` names a module, `from dino.loss import dino_loss` something in one.
            within = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= within & set(SOURCES) or {node.module}
    return found


def all_imports(module):
    """Also those of the modules that it imports, as far as they are ours."""
    found, waiting = set(), {module}
    while waiting:
        new = imports(waiting.pop()) - found
        found |= new
        waiting |= new & set(SOURCES)
    return found


def packages(names):
    return {name.partition(".")[0] for name in names}


def floor(module):
    for number, rooms in enumerate(FLOORS):
        if any(module == room or module.startswith(room + ".") for room in rooms):
            return number
    raise AssertionError(f"{module} is on no floor: add it to FLOORS")


@pytest.mark.parametrize("module", sorted(set(SOURCES) - {"dino"}))
def test_a_module_imports_only_its_own_floor_and_those_below(module):
    above = {name for name in imports(module) & set(SOURCES) if floor(name) > floor(module)}
    assert not above


def test_the_backbone_knows_nothing_of_the_method():
    assert all("dino" not in packages(imports(module)) for module in SOURCES if module.startswith("xcit"))


def test_loss_head_and_schedules_know_neither_files_nor_ranks():
    for module in ("dino.loss", "dino.head", "dino.schedules"):
        assert not packages(imports(module)) & {"dino", "xcit", "pathlib", "os"}, module


def test_drawing_and_options_know_no_torch():
    drawing = ("drawing", "gallery", "heads", "layout", "marks", "render", "run_page", "scale", "sheet")
    drawing += ("film", "page.picture_article", "picture_outputs", "record", "visualize_options")
    video = [module for module in SOURCES if module.startswith("dino.video.")]
    for module in (
        "dino.curves",
        "dino.runtime.options",
        *video,
        *(f"dino.attention.{name}" for name in drawing),
        *(f"dino.downstream.{room}.options" for room in ("classification", "detection", "segmentation")),
        *("dino.downstream.detection.drawing", "dino.downstream.segmentation.classes"),
    ):
        assert not packages(all_imports(module)) & {"torch", "torchvision", "timm", "xcit"}, module


def test_one_door_leads_to_the_backbones():
    doors = set()
    for module, path in SOURCES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr == "create_model":
                doors.add(module)
    assert doors == {"dino.runtime.backbones"}


_IMPORT_ALL = """
import importlib, socket, sys, warnings
def refuse(*_, **__): raise AssertionError("an import asked for the network")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
import torch
state, threads, dtype = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()
for name in sys.argv[1:]:
    importlib.import_module(name)
assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads
assert torch.get_default_dtype() == dtype
"""


def test_importing_everything_warns_of_nothing_asks_no_network_and_changes_nothing():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _IMPORT_ALL, *SOURCES],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_file_has_one_subject():
    assert not {path.name for path in SOURCES.values()} & {"utils.py", "misc.py", "common.py", "helpers.py"}
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in PYTHON_FILES}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}


@pytest.mark.parametrize("module", sorted(set(SOURCES) - {"dino", "dino.runtime"}))
def test_every_module_says_what_it_is(module):
    tree = ast.parse(SOURCES[module].read_text())
    assert ast.get_docstring(tree) or not tree.body


def test_the_code_owes_nothing():
    for path in SOURCES.values():
        with path.open("rb") as file:
            comments = [t.string for t in tokenize.tokenize(file.readline) if t.type == tokenize.COMMENT]
        assert not [comment for comment in comments if re.search(r"\b(TODO|FIXME|XXX|HACK)\b", comment)], path


def test_the_files_that_the_readme_names_exist():
    text = (ROOT / "README.md").read_text()
    named = set(
        re.findall(r"(?<![\w/.])((?:xcit|dino|tests|benchmarks|docs)/[\w/.-]*\w\.(?:py|md|png))", text)
    )
    assert {name for name in named if not (ROOT / name).exists()} == set()
