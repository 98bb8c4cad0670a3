"""Targets: the local device, and GPUs that are not there."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec

import jax
import numpy as np
import pytest

from trainingcompiler.compiling import compiler
from trainingcompiler.errors import UsageError
from trainingcompiler.program import StepProgram, TensorSpec
from trainingcompiler.targets import target as targets
from trainingcompiler.targets.gpus import GPUS
from trainingcompiler.targets.target import Target

INCREMENT = """
import numpy as np
from trainingcompiler.cache import jax_cache
from trainingcompiler.compiling import compiler
from trainingcompiler.errors import UsageError
from trainingcompiler.program import StepProgram, TensorSpec
from trainingcompiler.targets.target import Target
counter = TensorSpec(name="counter", shape=({size},), dtype=np.dtype("float32"), role="parameter")
program = StepProgram(
    name="increment", function=lambda state, _: ((state[0] + 1,), ()), state=(counter,), inputs=(), outputs=()
)
"""


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


# The pip extra [cuda13] compiles for all but the V100: tests/core/test_gpus.py.
COMPILABLE = [name for name in GPUS if name != "v100" or not find_spec("jax_cuda13_plugin")]


def own_gpu(path, **facts) -> Target:
    """A GPU described in a file."""
    path.write_text(json.dumps(facts))
    return Target.gpu(str(path))


def classify(batch_size: int = 16) -> StepProgram:
    """A step of gradient descent on a small image classifier: a convolution, a matrix product and a tanh."""

    def loss(state, images):
        kernel, matrix = state
        hidden = jax.nn.relu(jax.lax.conv_general_dilated(images, kernel, (2, 2), "SAME"))
        return (jax.numpy.tanh(hidden.reshape(batch_size, -1) @ matrix) ** 2).mean()

    def function(state, inputs):
        gradients = jax.grad(loss)(state, *inputs)
        return tuple(value - np.float32(0.1) * slope for value, slope in zip(state, gradients, strict=True)), ()

    def spec(name, role, *shape):
        return TensorSpec(name=name, shape=shape, dtype=np.dtype("float32"), role=role)

    return StepProgram(
        name="classify",
        function=function,
        state=(spec("kernel", "parameter", 32, 3, 3, 3), spec("matrix", "parameter", 32 * 16 * 16, 10)),
        inputs=(spec("images", "input", batch_size, 3, 32, 32),),
        outputs=(),
    )


@pytest.mark.gpu_plan
@pytest.mark.parametrize("name", COMPILABLE)
def test_convolutions_and_products_compile_for_every_described_gpu(name):
    executable = compiler.compile(classify(), Target.gpu(name))
    assert "__cudnn$convBackwardFilter" in executable.as_text()
    assert executable.memory.alias_bytes == 4 * (32 * 3 * 3 * 3 + 32 * 16 * 16 * 10)


@pytest.mark.gpu_plan
def test_a_gpu_of_a_file_is_compiled_for_and_cannot_run(tmp_path):
    target = own_gpu(
        tmp_path / "own.json", like="l4", name="my card", compute_capability="8.6", memory_bytes=12 * 2**30
    )
    executable = compiler.compile(increment(), target)
    assert executable.memory.alias_bytes == 4000
    with pytest.raises(UsageError, match="described my card"):
        executable((np.zeros(1000, np.float32),), ())


@pytest.mark.gpu_plan
def test_two_gpus_of_one_name_are_compiled_for_apart(tmp_path):
    path = tmp_path / "own.json"
    targets_alike = [
        own_gpu(path, like="h200"),
        own_gpu(path, like="h200", compute_capability="7.5"),
        Target.gpu("h200"),
    ]
    texts = [compiler.compile(classify(), target).as_text() for target in targets_alike]
    assert texts[0] == texts[2] != texts[1]


@pytest.mark.gpu_plan
@pytest.mark.skipif(find_spec("jax_cuda13_plugin") is not None, reason="CUDA 13 compiles for it")
def test_a_gpu_at_which_xla_would_end_the_process_is_refused(tmp_path):
    target = own_gpu(tmp_path / "own.json", like="b200", name="a new card", compute_capability=[11, 0])
    with pytest.raises(UsageError, match=r"CUDA 12, which is installed, does not compile for a new card"):
        compiler.compile(classify(), target)


@pytest.mark.gpu_plan
def test_at_log_level_3_xla_says_nothing_of_what_does_not_fit():
    """Of state that is too large, it would say that its own "calculation" has an error."""
    script = f"""{INCREMENT.format(size=2**33)}
print(compiler.compile(program, Target.gpu("t4")).memory.argument_bytes)
"""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert (int(run.stdout), run.stderr) == (2**35, "")


@pytest.mark.gpu_plan
@pytest.mark.parametrize("name", COMPILABLE)
def test_every_described_gpu_is_accepted_and_cannot_run(name):
    executable = compiler.compile(increment(), Target.gpu(name))
    assert executable.memory.alias_bytes == 4000
    with pytest.raises(UsageError, match=f"described {GPUS[name].name}"):
        executable((np.zeros(1000, np.float32),), ())


@pytest.mark.gpu_plan
@pytest.mark.skipif(Target.local().platform == "cuda", reason="there is a GPU, so JAX loads its compiler")
def test_a_compiler_that_jax_does_not_load_is_told_apart_from_a_missing_one():
    script = f"""{INCREMENT.format(size=9)}
try:
    compiler.compile(program, Target.gpu("h200"))
except UsageError as error:
    print(error)
"""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert "JAX_PLATFORMS=cpu" in run.stdout


@pytest.mark.gpu_plan
def test_what_cannot_be_read_back_is_not_kept(tmp_path):
    script = f"""{INCREMENT.format(size=9)}
folder = jax_cache.enable_persistent_cache({str(tmp_path)!r})
import os
for target in (Target.gpu("h200"), Target.local(), Target.gpu("h200"), Target.local()):
    compiler.compile(program, target)
    print(sum(name.endswith("-cache") for name in os.listdir(folder)), jax_cache.hits_and_misses().hits)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["0 0", "1 0", "1 0", "1 1"], run.stderr
