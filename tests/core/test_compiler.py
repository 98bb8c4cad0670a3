"""The options of XLA that a program's meaning asks for."""

import dataclasses

import jax
import numpy as np
import pytest

from trainingcompiler.compiler import compile, options
from trainingcompiler.program import StepProgram, TensorSpec
from trainingcompiler.targets import Target

CPU = Target(platform="cpu", description="cpu", device_count=1)
GPU = Target(platform="cuda", description="a GPU", device_count=1, compute_capability=(9, 0))
STATE = TensorSpec(name="state 0", shape=(4,), dtype=np.dtype("float32"), role="parameter")
PLAIN = StepProgram(name="step", function=lambda s, i: ((s[0] + 1,), ()), state=(STATE,), inputs=(), outputs=())


@pytest.mark.parametrize("target", [CPU, GPU])
def test_a_plain_program_needs_none(target):
    assert options(PLAIN, target) == {}


def test_deterministic_is_told_to_a_gpu():
    program = dataclasses.replace(PLAIN, is_deterministic=True)
    assert options(program, GPU) == {"xla_gpu_deterministic_ops": True}
    assert options(program, CPU) == {}  # where nothing is added in an order that may change


def test_what_recomputes_is_scheduled_for_memory_on_a_cpu():
    program = dataclasses.replace(PLAIN, recomputes=True)
    assert options(program, GPU) == {}  # a GPU's schedule is for memory anyway
    (name,) = options(program, CPU)
    assert name in ("xla_cpu_scheduler_type", "xla_cpu_enable_concurrency_optimized_scheduler")


def test_the_options_reach_xla():
    program = dataclasses.replace(PLAIN, recomputes=True, is_deterministic=True)
    (state,), () = compile(program)((jax.numpy.zeros(4, "float32"),), ())
    assert state.tolist() == [1.0] * 4
