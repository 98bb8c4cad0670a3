"""What workers compute together."""

from jax import lax

from trainingcompiler.workers import AXIS

from .operands import Array
from .registry import lowers


@lowers("trainingcompiler.sum_over_workers.default")
def sum_over_workers(x: Array) -> Array:
    return lax.psum(x, AXIS)
