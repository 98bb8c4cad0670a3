"""The options of XLA that a program's meaning asks for."""

import contextlib
import dataclasses

import jax
import numpy as np
import pytest

from trainingcompiler.compiling import compiler
from trainingcompiler.compiling.compiler import compile, options
from trainingcompiler.errors import NotEnoughMemoryError
from trainingcompiler.program import StepProgram, TensorSpec
from trainingcompiler.reporting.events import Note, subscribe
from trainingcompiler.targets.target import Target
from trainingcompiler.targets.xla_options import sound_fusions


@contextlib.contextmanager
def collected(kind):
    events = []
    unsubscribe = subscribe(lambda event: events.append(event) if isinstance(event, kind) else None)
    yield events
    unsubscribe()


CPU = Target(platform="cpu", description="cpu", device_count=1)
GPU = Target(platform="cuda", description="a GPU", device_count=1, compute_capability=(9, 0))
STATE = TensorSpec(name="state 0", shape=(4,), dtype=np.dtype("float32"), role="parameter")
PLAIN = StepProgram(name="step", function=lambda s, i: ((s[0] + 1,), ()), state=(STATE,), inputs=(), outputs=())


LIBRARY = {"xla_gpu_enable_triton_gemm": False}  # products by cuBLAS


def test_a_plain_program_needs_no_more_than_the_fusions_that_are_right():
    assert options(PLAIN, CPU) == sound_fusions("cpu")


def test_a_gpu_that_is_there_multiplies_by_its_library(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert options(PLAIN, GPU) == LIBRARY
    assert options(dataclasses.replace(PLAIN, saves_memory=True), GPU) == {}
    assert options(PLAIN, Target.gpu("h200")) == {}  # a plan is of the least memory
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true")
    assert options(PLAIN, GPU) == {}  # the person has said otherwise


def test_what_does_not_fit_is_compiled_again_for_memory(monkeypatch):
    checked = []

    def check(executable):
        checked.append(executable.program.saves_memory)
        if not executable.program.saves_memory:
            raise NotEnoughMemoryError(program="step", needed_bytes=2, available_bytes=1, buffers=[])

    monkeypatch.setattr(compiler, "memory_check", check)
    with pytest.raises(NotEnoughMemoryError):
        compile(PLAIN)  # on a CPU there is one way
    monkeypatch.setattr(compiler, "options", lambda program, target: {} if program.saves_memory else LIBRARY)
    with collected(Note) as notes:
        assert compile(PLAIN).program.saves_memory
    assert checked == [False, False, True]
    assert [note.text for note in notes] == [
        "step does not fit as XLA makes it fastest, and is compiled to need less memory"
    ]


def test_deterministic_is_told_to_a_gpu():
    program = dataclasses.replace(PLAIN, is_deterministic=True)
    assert options(program, GPU) == {"xla_gpu_deterministic_ops": True, **LIBRARY}
    assert options(program, CPU) == sound_fusions("cpu")  # where nothing is added in an order that may change


def test_what_recomputes_is_scheduled_for_memory_on_a_cpu():
    program = dataclasses.replace(PLAIN, recomputes=True)
    assert options(program, GPU) == LIBRARY  # a GPU's schedule is for memory anyway
    (name,) = options(program, CPU).keys() - sound_fusions("cpu").keys()
    assert name in ("xla_cpu_scheduler_type", "xla_cpu_enable_concurrency_optimized_scheduler")


def test_the_options_reach_xla():
    program = dataclasses.replace(PLAIN, recomputes=True, is_deterministic=True)
    (state,), () = compile(program)((jax.numpy.zeros(4, "float32"),), ())
    assert state.tolist() == [1.0] * 4
