"""The options of XLA: what they are, that a key holds them, and that the programs which asked for them are right."""

import jax
import jaxlib
import numpy as np
import pytest

from trainingcompiler.cache import executables
from trainingcompiler.compiling import compiler
from trainingcompiler.program import StepProgram, TensorSpec
from trainingcompiler.targets import xla_options
from trainingcompiler.targets.target import Target
from trainingcompiler.targets.xla_options import FUSIONS, sound_fusions

CPU = Target(platform="cpu", description="cpu", device_count=1)
RANDOM = np.random.default_rng(0)


def program(function, array: np.ndarray, digest: str | None = None) -> StepProgram:
    def spec(name, values, role):
        return TensorSpec(name=name, shape=values.shape, dtype=values.dtype, role=role)

    return StepProgram(
        name="step",
        function=lambda state, inputs: (state, (function(inputs[0]),)),
        state=(spec("weight", np.zeros(1, np.float32), "parameter"),),
        inputs=(spec("batch", array, "batch"),),
        outputs=(),
        digest=digest,
    )


def product_of_a_constant_summed(x):
    return jax.numpy.matmul(x, jax.numpy.ones_like(x)).sum((1, 2))


def product_of_a_constant_multiplied_and_summed(x):
    return (jax.numpy.matmul(x, jax.numpy.ones_like(x)) * x).sum((1, 2))


def product_of_each_row_squared_and_summed(x):
    return jax.vmap(lambda row: ((jax.numpy.eye(3, dtype=x.dtype) @ row) ** 2).sum())(x)


FIELDS = RANDOM.standard_normal((8, 64, 64)).astype(np.float32)
ROWS = np.stack([np.arange(32_769), *np.zeros((2, 32_769))], axis=1).astype(np.float32)


@pytest.mark.parametrize(
    ("function", "array", "expected"),
    [
        (product_of_a_constant_summed, FIELDS, 64 * FIELDS.astype(np.float64).sum((1, 2))),
        (
            product_of_a_constant_multiplied_and_summed,
            FIELDS,
            (FIELDS.astype(np.float64).sum(2) ** 2).sum(1),
        ),
        (product_of_each_row_squared_and_summed, ROWS, (ROWS.astype(np.float64) ** 2).sum(1)),
    ],
)
def test_what_xlas_fusions_of_sums_compute_wrongly_is_right(function, array, expected):
    """For the jaxlib that is installed. See https://github.com/jax-ml/jax/issues/39103."""
    executable = compiler.compile(program(function, array), CPU)
    _, (result,) = executable((jax.numpy.zeros(1, np.float32),), (array,))
    # Sums of 4,096 terms that cancel, in float32: 1e-4 of the largest is ten times what numpy's own float32 is off.
    np.testing.assert_allclose(np.asarray(result), expected, rtol=1e-5, atol=1e-4 * np.abs(expected).max())


def test_only_a_cpus_unsound_fusions_are_turned_off(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr(jaxlib.version, "__version_info__", (0, 12, 0, 1))
    needed = {FUSIONS: "LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION,LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}
    assert sound_fusions("cpu") == xla_options.options(program(np.sum, FIELDS), CPU) == needed
    assert sound_fusions("cuda") == {}
    monkeypatch.setattr(jaxlib.version, "__version_info__", (0, 10, 1))
    assert sound_fusions("cpu") == {}


def test_what_the_person_says_of_them_in_xla_flags_stays(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"--{FUSIONS}=")
    assert sound_fusions("cpu") == {}


def test_an_executable_is_kept_under_its_options(monkeypatch):
    kept = program(np.sum, FIELDS, digest="one")
    before = executables.key_of(kept, CPU)
    monkeypatch.setattr(executables, "options", lambda *_: {FUSIONS: ""})
    assert executables.key_of(kept, CPU) != before
