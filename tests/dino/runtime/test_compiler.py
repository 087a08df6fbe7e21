"""When the compiler is used, and what is said where it cannot be."""

import pytest
import torch

from dino.plan import create_distillation
from dino.runtime import compiler
from dino.runtime.compiler import compiler_problem, pick_compile
from dino.runtime.options import UserError
from tests.dino.small_runs import CPU, tiny

CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("wanted", "device", "problem", "expected"),
    [
        ("auto", CPU, "", False),
        ("auto", CUDA, "", True),
        ("auto", CUDA, "no Triton", False),
        ("true", CPU, "", True),
        ("false", CUDA, "", False),
    ],
)
def test_auto_compiles_on_a_gpu_whose_compiler_works(wanted, device, problem, expected, monkeypatch):
    monkeypatch.setattr(compiler, "compiler_problem", lambda device: problem)
    assert pick_compile(wanted, device) is expected


def test_a_compiler_that_does_not_work_is_refused_when_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(compiler, "compiler_problem", lambda device: "no C compiler found")
    with pytest.raises(
        UserError, match=r"^--compile true: .*: no C compiler found; use --compile auto or false$"
    ):
        pick_compile("true", CPU)


@pytest.mark.parametrize("broken", [True, False])
def test_what_keeps_the_compiler_from_working_is_found_by_compiling(broken, monkeypatch):
    def compile(function, **options):
        def fail(*arguments):
            raise RuntimeError("\nno header Python.h\nmore of it")

        return fail if broken else function

    monkeypatch.setattr(torch, "compile", compile)
    assert compiler_problem(CPU) == ("no header Python.h" if broken else "")


def test_networks_are_compiled_as_the_options_say(tmp_path, monkeypatch):
    monkeypatch.setattr(compiler, "compiler_problem", lambda device: "")
    for wanted, expected in (("true", True), ("auto", False)):
        parts = create_distillation(tiny("", tmp_path, compile=wanted), CPU, "fp32")
        assert (parts.student.is_compiled, parts.teacher.is_compiled) == (expected, expected)


def test_recomputed_activations_are_not_compiled(tmp_path):
    options = tiny("", tmp_path, compile="true", grad_checkpointing=True)
    with pytest.raises(UserError, match="--compile true does not go with --grad_checkpointing true"):
        create_distillation(options, CPU, "fp32")
