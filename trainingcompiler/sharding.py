"""Where each array of a program lives on several devices: a copy on every one, or divided between them.

The program stays that of one device: the script's batch is the global batch, and only the placement of state and inputs
differs. XLA's partitioner (GSPMD, Xu et al. 2021, https://arxiv.org/abs/2105.04663) puts the collectives in.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trainingcompiler.program import StepProgram, TensorSpec

Strategy = Literal["dp", "fsdp"]
STRATEGIES = {
    "dp": "every device holds the whole training state",
    "fsdp": "the training state is divided between the devices, and gathered where it is used",
}
AXIS = "data"

# Below this an all-gather costs more than it saves: a norm's weights, a bias.
_LEAST_ELEMENTS = 2**14


def mesh_of(devices: Sequence[Any]) -> Mesh:
    """All devices along one axis."""
    return Mesh(np.array(devices), (AXIS,))


def shardings(program: StepProgram, mesh: Mesh, strategy: Strategy) -> tuple[tuple, tuple]:
    """How the state and the inputs of a program are placed.

    Args:
        program: The step.
        mesh: The devices.
        strategy: What becomes of the state. The batch is divided under both.

    Returns:
        `(state, inputs)`: a sharding for each of the program's arrays.
    """
    return (
        tuple(NamedSharding(mesh, _of_state(spec, mesh.size, strategy)) for spec in program.state),
        tuple(NamedSharding(mesh, _of_input(spec, mesh.size, strategy)) for spec in program.inputs),
    )


def bytes_per_device(specs: Sequence[TensorSpec], devices: int, strategy: Strategy) -> int:
    """Bytes that the arrays of a training state take on each device."""
    return sum(
        spec.size_bytes // (devices if any(_of_state(spec, devices, strategy)) else 1) for spec in specs
    )  # fmt: skip


def _of_input(spec: TensorSpec, devices: int, strategy: Strategy) -> PartitionSpec:
    if spec.batch_dim is not None and spec.shape[spec.batch_dim] % devices == 0:
        return _divided(spec.batch_dim)
    # What the step only reads and no batch brings: frozen weights, such as those behind an adapter.
    return _of_state(spec, devices, strategy) if spec.role == "constant" else PartitionSpec()


def _of_state(spec: TensorSpec, devices: int, strategy: Strategy) -> PartitionSpec:
    """Divides the longest dim that can be divided, the first of equals."""
    if strategy == "dp" or devices == 1 or np.prod(spec.shape, dtype=np.int64) < _LEAST_ELEMENTS:
        return PartitionSpec()
    lengths = [length if length % devices == 0 else 0 for length in spec.shape]
    longest = max(lengths)
    return _divided(lengths.index(longest)) if longest else PartitionSpec()


def _divided(dim: int) -> PartitionSpec:
    return PartitionSpec(*[None] * dim, AXIS)
