"""What workers compute together."""

from jax import lax

from trainingcompiler.workers import AXIS

from .operands import Array
from .registry import lowers


@lowers("trainingcompiler.sum_over_workers.default")
def sum_over_workers(x: Array) -> Array:
    return lax.psum(x, AXIS)


@lowers("trainingcompiler.mean_over_workers.default")
def mean_over_workers(tensors: list[Array], count: int) -> list[Array]:
    flat = lax.concatenate([lax.reshape(x, (x.size,)) for x in tensors], 0)
    mean = lax.psum(flat / count, AXIS)
    parts = lax.split(mean, [x.size for x in tensors])
    return [lax.reshape(part, x.shape) for part, x in zip(parts, tensors, strict=True)]
