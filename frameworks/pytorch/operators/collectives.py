"""What workers compute together."""

from jax import lax

from trainingcompiler.parallel.spmd import AXIS

from .promotion import Array
from .registry import lowers

# Elements from which on a tensor is sent as it is: on a CPU, writing it into a buffer with its neighbours, and reading
# it out again, takes longer than a message of its own. With 2**16 here, a small GPT is some 5% slower.
_ALONE = 2**19


@lowers("trainingcompiler.sum_over_workers.default")
def sum_over_workers(x: Array) -> Array:
    return lax.psum(x, AXIS)


@lowers("trainingcompiler.mean_over_workers.default")
def mean_over_workers(tensors: list[Array], count: int) -> list[Array]:
    means = {place: lax.psum(x / count, AXIS) for place, x in enumerate(tensors) if x.size >= _ALONE}
    together = [place for place in range(len(tensors)) if place not in means]
    if together:
        flat = lax.concatenate([lax.reshape(tensors[place], (tensors[place].size,)) for place in together], 0)
        parts = lax.split(lax.psum(flat / count, AXIS), [tensors[place].size for place in together])
        means |= {place: lax.reshape(part, tensors[place].shape) for place, part in zip(together, parts, strict=True)}
    return [means[place] for place in range(len(tensors))]
