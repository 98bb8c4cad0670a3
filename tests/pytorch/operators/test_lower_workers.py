"""Means over workers: of every tensor, whether it is sent alone or with its neighbours."""

import jax
import numpy as np
import pytest

from trainingcompiler.frameworks.pytorch.operators.collectives import mean_over_workers
from trainingcompiler.parallel.spmd import AXIS

WORKERS = 3
SMALL, LARGE = (2, 5), (1024, 512)


def means(tensors: list) -> list:
    return mean_over_workers(tensors, WORKERS)


@pytest.mark.parametrize(
    "shapes",
    [[SMALL], [LARGE], [SMALL, LARGE, (), (7,), LARGE], [(0, 3), SMALL]],
    ids=["small", "large", "mixed", "empty"],
)
def test_every_tensor_becomes_its_mean_in_its_place(shapes):
    generator = np.random.default_rng(0)
    given = [generator.standard_normal((WORKERS, *shape)).astype(np.float32) for shape in shapes]
    found = jax.vmap(means, axis_name=AXIS)(given)
    for mean, of_workers in zip(found, given, strict=True):
        for mine in mean:  # the same for each
            np.testing.assert_allclose(mine, of_workers.mean(0), rtol=1e-5, atol=1e-6)  # another order of three terms


def test_only_small_tensors_are_copied_together():
    given = [jax.ShapeDtypeStruct(shape, np.float32) for shape in (SMALL, LARGE, (7,), LARGE)]
    equations = jax.make_jaxpr(means, axis_env=[(AXIS, WORKERS)])(given).eqns
    (copied,) = [equation.outvars[0].aval.shape for equation in equations if equation.primitive.name == "concatenate"]
    assert copied == (17,)
    sent = [equation for equation in equations if equation.primitive.name.startswith("psum")]
    assert sorted(equation.invars[0].aval.size for equation in sent) == [17, 1024 * 512, 1024 * 512]
