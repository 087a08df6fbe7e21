"""What the pages say is there is there."""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RELIABILITY = (ROOT / "docs" / "reliability.md").read_text()
DOWNSTREAM = (ROOT / "docs" / "downstream.md").read_text()


def functions_of(path):
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("named", sorted(set(re.findall(r"`(tests/[^`]+)`", RELIABILITY))))
def test_a_test_that_the_page_names_exists(named):
    file, _, name = named.partition("::")
    assert (ROOT / file).exists(), file
    assert not name or name in functions_of(ROOT / file)


def test_every_fault_has_a_test():
    rows = [line for line in RELIABILITY.splitlines() if line.startswith("|") and line.count("|") == 5]
    faults = rows[rows.index(next(row for row in rows if "what is said" in row)) + 2 :]
    faults = faults[: next((n for n, row in enumerate(faults) if "until the first picture" in row), None)]
    assert len(faults) >= 18
    assert all("::test_" in row.split("|")[4] for row in faults)


def test_options_that_the_page_names_exist():
    options = set(re.findall(r"`?(--[a-z][a-z0-9_-]+)", RELIABILITY))
    known = "".join(path.read_text() for path in (ROOT / "dino").glob("*options.py"))
    known += (ROOT / "benchmarks" / "processes.py").read_text()
    of_others = {
        "--nproc_per_node",
        "--max_restarts",
        "--nnodes",
        "--rdzv_backend",
        "--rdzv_endpoint",
        "--output",
    }
    unknown = {name for name in options - of_others if not re.search(rf"    {name[2:]}: ", known)}
    assert unknown == set()


def test_options_and_files_of_the_other_tasks_exist():
    options = {
        name.replace("-", "_") for name in re.findall(r"(?<![\w-])--([a-z][a-z0-9_-]*[a-z0-9])", DOWNSTREAM)
    }
    sources = [*(ROOT / "dino" / "downstream").rglob("*.py"), *(ROOT / "dino" / "evaluation").glob("*.py")]
    known = "".join(path.read_text() for path in sources)
    unknown = {name for name in options - {"nproc_per_node"} if not re.search(rf"    {name}: ", known)}
    assert unknown == set()
    for link in re.findall(r"\]\(\.\./([\w/.]+)\)", DOWNSTREAM):
        assert (ROOT / link).exists(), link
    for module in set(re.findall(r"-m (dino[\w.]+)", DOWNSTREAM)):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module


def test_the_measured_throughput_is_that_of_the_results():
    report = json.loads((ROOT / "benchmarks" / "results" / "processes.json").read_text())
    for row in report["rows"]:
        least, most = row["pictures_per_second_range"]
        written = f"| {row['processes']} | {row['pictures_per_second']:.1f} ({least:.1f} to {most:.1f}) | "
        assert written + f"{100 * row['waiting_share']:.1f} % |" in RELIABILITY


def test_the_measured_data_are_those_of_the_results():
    report = json.loads((ROOT / "benchmarks" / "results" / "data_scale.json").read_text())
    folder, shards = report["folder"], report["shards"]
    for part, own in (
        (folder["torchvision_list"], True),
        (folder["first_start"], False),
        (folder["from_index"], True),
        (shards["first_start"], False),
        (shards["from_index"], True),
    ):
        written = f"| {part['start_seconds']:.1f} s | {part['added_mb']:.0f} MB | "
        written += f"{part['after_pass'][-1]['worker_private_mb']:.0f} MB |" if own else "|"
        assert written in RELIABILITY, written
