"""Says on several devices where an activation lives, at the few places from which XLA carries it to all others.

Without it XLA may carry the placement of a weight into the activations: Llama 70B on 128 x 8 GPUs, whose query weights
are divided 1,024 ways, came out with attention heads cut into pieces that cuDNN's kernel cannot take.
"""

import jax
from jax.sharding import NamedSharding, PartitionSpec

from trainingcompiler.parallel.sharding import DATA, TENSOR, mesh_of
from trainingcompiler.targets.target import current as current_target

from .promotion import Array


def rows(array: Array) -> Array:
    """The array, its first dim divided like the batch."""
    return _placed(array, DATA)


def heads(array: Array) -> Array:
    """(B, H, L, E), the first dim divided like the batch and the second like a layer."""
    return _placed(array, DATA, TENSOR)


def _placed(array: Array, *axes: str) -> Array:
    target = current_target()
    # One device has nothing to divide, and one that is only described need not be compiled for: a check lowers for it.
    devices = None if target is None or target.device_count == 1 else target.devices()
    if target is None or devices is None:
        return array
    mesh = mesh_of(devices, target.strategy)
    lengths = zip(axes, array.shape, strict=False)
    divided = PartitionSpec(*(axis if length % mesh.shape[axis] == 0 else None for axis, length in lengths))
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, divided))
