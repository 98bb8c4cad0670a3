"""Targets: the local device, and GPUs that are not there."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

from trainingcompiler import compiler, targets
from trainingcompiler.errors import UsageError
from trainingcompiler.gpus import GPUS
from trainingcompiler.program import StepProgram, TensorSpec
from trainingcompiler.targets import Target


def increment(size: int = 1000) -> StepProgram:
    """Counts, in an array."""
    counter = TensorSpec(name="counter", shape=(size,), dtype=np.dtype("float32"), role="parameter")
    return StepProgram(
        name="increment",
        function=lambda state, inputs: ((state[0] + 1,), ()),
        state=(counter,),
        inputs=(),
        outputs=(),
    )


def test_the_local_device_runs_what_is_compiled_for_it():
    executable = compiler.compile(increment())
    assert executable.target == Target.local()
    assert executable.target.compute_capability is None or executable.target.platform == "cuda"
    assert executable.memory.alias_bytes == 4000
    assert "HloModule jit_increment" in executable.as_text()


def test_a_program_knows_what_it_is_traced_for():
    seen = []
    program = increment()
    watching = StepProgram(
        name="watching",
        function=lambda state, inputs: (seen.append(targets.current()), program.function(state, inputs))[1],
        state=program.state,
        inputs=(),
        outputs=(),
    )
    compiler.compile(watching)
    assert set(seen) == {Target.local()}
    assert targets.current() is None


@pytest.mark.parametrize("name", GPUS)
def test_descriptions(name):
    target = Target.gpu(name.upper())
    gpu = target.described
    assert target.platform == "cuda"
    assert target.description == gpu.name
    assert f"device_memory_size: {gpu.memory_bytes}\n" in gpu.description()
    assert not re.search(r": *$", gpu.description(), re.MULTILINE)


def test_an_unknown_gpu_is_refused_with_the_known_ones():
    with pytest.raises(UsageError, match="'h2000'; did you mean h200"):
        Target.gpu("h2000")
    with pytest.raises(UsageError, match="described are h200, h100"):
        Target.gpu("abacus")


@pytest.mark.skipif(targets.compiles_for_gpus(), reason="XLA's compiler for GPUs is installed")
def test_missing_wheels_are_named():
    with pytest.raises(UsageError, match=r'pip install "trainingcompiler\[cuda12\]"'):
        compiler.compile(increment(), Target.gpu("h200"))


@pytest.mark.gpu_plan
@pytest.mark.parametrize("name", GPUS)
def test_every_described_gpu_is_accepted_and_cannot_run(name):
    executable = compiler.compile(increment(), Target.gpu(name))
    assert executable.memory.alias_bytes == 4000
    with pytest.raises(UsageError, match=f"described {GPUS[name].name}"):
        executable((np.zeros(1000, np.float32),), ())


@pytest.mark.gpu_plan
@pytest.mark.skipif(Target.local().platform == "cuda", reason="there is a GPU, so JAX loads its compiler")
def test_a_compiler_that_jax_does_not_load_is_told_apart_from_a_missing_one():
    script = """
from trainingcompiler.errors import UsageError
from trainingcompiler.targets import Target
try:
    Target.gpu("h200").sharding()
except UsageError as error:
    print(error)
"""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert "JAX_PLATFORMS=cpu" in run.stdout


@pytest.mark.gpu_plan
def test_what_cannot_be_read_back_is_not_kept(tmp_path):
    script = f"""
import numpy as np
from trainingcompiler import cache, compiler
from trainingcompiler.program import StepProgram, TensorSpec
from trainingcompiler.targets import Target
counter = TensorSpec(name="counter", shape=(9,), dtype=np.dtype("float32"), role="parameter")
program = StepProgram(
    name="increment", function=lambda state, _: ((state[0] + 1,), ()), state=(counter,), inputs=(), outputs=()
)
folder = cache.enable_persistent_cache({str(tmp_path)!r})
import os
for target in (Target.gpu("h200"), Target.local(), Target.gpu("h200"), Target.local()):
    compiler.compile(program, target)
    print(sum(name.endswith("-cache") for name in os.listdir(folder)), cache.hits_and_misses().hits)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["0 0", "1 0", "1 0", "1 1"], run.stderr
