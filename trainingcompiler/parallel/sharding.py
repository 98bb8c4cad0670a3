"""Where each array of a program lives on several devices: a copy on every one, or divided between them.

The program stays that of one device: the script's batch is the global batch, and only the placement of state and inputs
differs. XLA's partitioner (GSPMD, Xu et al. 2021, https://arxiv.org/abs/2105.04663) puts the collectives in.
"""

from collections import Counter
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trainingcompiler.program import StepProgram, TensorSpec
from trainingcompiler.strategy import Strategy

DATA, TENSOR = "data", "tensor"
"""The axes: devices along the first have different rows of the batch, those along the second parts of each layer."""

# Below this an all-gather costs more than it saves: a norm's weights, a bias.
_LEAST_ELEMENTS = 2**14


def mesh_of(devices: Sequence[Any], strategy: Strategy) -> Mesh:
    """All devices; those that share each layer lie next to each other, where the links are fastest."""
    return Mesh(np.array(devices).reshape(-1, strategy.tensor_parallel), (DATA, TENSOR))


def shardings(program: StepProgram, mesh: Mesh, strategy: Strategy) -> tuple[tuple, tuple, tuple]:
    """How the arrays of a program are placed.

    Args:
        program: The step.
        mesh: The devices.
        strategy: What becomes of the state. The batch is divided under each.

    Returns:
        `(state, inputs, outputs)`: a sharding for each of the program's arrays, and None for outputs that XLA places.
    """
    data = mesh.size // strategy.tensor_parallel

    def placed(parts: PartitionSpec) -> NamedSharding:
        return NamedSharding(mesh, parts)

    return (
        tuple(placed(_of_state(spec, data, strategy)) for spec in program.state),
        tuple(placed(_of_input(spec, data, strategy)) for spec in program.inputs),
        tuple(placed(_of_state(s, data, strategy)) if s.role == "gradient" else None for s in program.outputs),
    )


def dim_to_divide(shape: Sequence[int], parts: int) -> int | None:
    """The longest dim that can be divided, the first of equals; None if there is none, or it would not pay."""
    lengths = [0 if length % parts else length for length in shape]
    return lengths.index(max(lengths)) if prod(shape) >= _LEAST_ELEMENTS and any(lengths) else None


def bytes_per_device(specs: Sequence[TensorSpec], devices: int, strategy: Strategy) -> int:
    """Bytes that the arrays of a training state take on each device."""
    sizes = {DATA: devices // strategy.tensor_parallel, TENSOR: strategy.tensor_parallel}

    def parts(spec: TensorSpec) -> int:
        axes = _of_state(spec, sizes[DATA], strategy)
        return prod(
            sizes[axis] for of_dim in axes for axis in (of_dim if isinstance(of_dim, tuple) else (of_dim,)) if axis
        )

    return sum(spec.size_bytes // parts(spec) for spec in specs)  # fmt: skip


def with_batch_found(program: StepProgram) -> StepProgram:
    """The same program, whose inputs know their batch dim: that of the length which most of them begin with.

    Where it is taken wrongly, the same numbers come out, more slowly: placement decides nothing else.
    """
    if any(spec.batch_dim is not None for spec in program.inputs):
        return program
    batch = [spec for spec in program.inputs if spec.role == "batch" and spec.shape]
    if not batch:
        return program
    counts = Counter(spec.shape[0] for spec in batch)
    # Among equals, the first dim of the largest input: labels may be fewer than positions.
    largest = max(batch, key=lambda spec: (counts[spec.shape[0]], spec.size_bytes))
    return program.with_batch(largest.shape[0])


def undivided_rows(program: StepProgram, devices: int, strategy: Strategy) -> int | None:
    """The rows of a batch that the devices cannot divide, so that each computes all of them; None if they can."""
    rows = [spec.shape[spec.batch_dim] for spec in program.inputs if spec.batch_dim is not None]
    return rows[0] if rows and rows[0] % (devices // strategy.tensor_parallel) else None


def _of_input(spec: TensorSpec, data: int, strategy: Strategy) -> PartitionSpec:
    if spec.batch_dim is not None and spec.shape[spec.batch_dim] % data == 0:
        return PartitionSpec(*[None] * spec.batch_dim, DATA) if data > 1 else PartitionSpec()
    # What the step only reads and no batch brings: frozen weights, such as those behind an adapter.
    return _of_state(spec, data, strategy) if spec.role == "constant" else PartitionSpec()


def _of_state(spec: TensorSpec, data: int, strategy: Strategy) -> PartitionSpec:
    """Divides the dim of the layer's rule, and the longest one that can be divided further, the first of equals."""
    axes: list[tuple[str, ...] | str | None] = [None] * len(spec.shape)
    shared, lengths = strategy.tensor_parallel, list(spec.shape)
    if shared > 1 and spec.tensor_dim is not None and spec.shape[spec.tensor_dim] % shared == 0:
        axes[spec.tensor_dim] = TENSOR
        lengths[spec.tensor_dim] //= shared
    if strategy.divides_state and data > 1 and prod(spec.shape) >= _LEAST_ELEMENTS:
        lengths = [0 if length % data else length for length in lengths]
        # The rule's own dim first. Were the other one of an embedding divided, XLA would carry that on into the
        # activations, and sum them instead of gathering weights: 416 GiB a step for Llama 7B on 8 x 8 GPUs, not 88.
        shared_dim = axes.index(TENSOR) if TENSOR in axes and lengths[axes.index(TENSOR)] else None
        dim = shared_dim if shared_dim is not None else lengths.index(max(lengths))
        if lengths[dim]:
            axes[dim] = (TENSOR, DATA) if axes[dim] else DATA
    while axes and axes[-1] is None:  # equal placements compare equal
        axes.pop()
    return PartitionSpec(*axes)
