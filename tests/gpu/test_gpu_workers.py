"""What workers of one program do on GPUs: XLA is told that their arrays are equal, and may not believe it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trainingcompiler.targets.target import Target

pytestmark = pytest.mark.gpu_plan


def test_a_sum_over_workers_stays_a_sum():
    """Were "replicated" taken for "equal", XLA could put a product with the number of workers in its place."""
    mesh = Mesh(np.array(Target.gpu("h100", 4).devices()), ("workers",))
    everyone = NamedSharding(mesh, PartitionSpec())

    def step(weights, batch):
        gradient = jax.grad(lambda w: (batch @ w).sum())(weights)
        return weights - lax.psum(gradient / 4, "workers")

    each = jax.shard_map(step, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    weights, batch = jax.ShapeDtypeStruct((256, 128), jnp.float32), jax.ShapeDtypeStruct((64, 256), jnp.float32)
    jitted = jax.jit(each, in_shardings=(everyone, everyone), out_shardings=everyone, donate_argnums=0)
    text = jitted.lower(weights, batch).compile().as_text()
    assert "all-reduce" in text and "replica_groups={{0,1,2,3}}" in text
