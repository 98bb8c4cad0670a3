"""`StepProgram`: one training step as a pure function on arrays, the one object in the middle of the house."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import numpy as np

Role = Literal["parameter", "buffer", "gradient", "optimizer", "hyperparameter", "rng", "constant", "batch", "output"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """The name, shape, dtype and meaning of one array that enters or leaves a program.

    Attributes:
        name: What a person would call it: `"blocks.0.attn.weight"`, `"exp_avg of blocks.0.attn.weight"`.
        shape: Sizes, in elements.
        dtype: NumPy dtype (`bfloat16` through ml_dtypes).
        role: What the array is to the training step.
        batch_dim: The dim along which a batch input is divided; None for everything else.
        tensor_dim: The dim along which devices that share a layer divide a weight, and what belongs to it; None where
            each has it whole.
        is_common: Whether all workers have the same values, so that they may divide them.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    role: Role
    batch_dim: int | None = None
    tensor_dim: int | None = None
    is_common: bool = False

    @property
    def size_bytes(self) -> int:
        """Bytes of one copy of the array."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class StepProgram:
    """One training step (or one part of it) as a pure function, with its state named.

    Attributes:
        name: Shown to the user and part of the cache key, e.g. `"train_step"`.
        function: `(state, inputs) -> (new_state, outputs)`, tuples of arrays; traceable by `jax.jit`. `new_state`
            has the shapes, dtypes and order of `state`.
        state: What the step writes. Its buffers are donated: the step updates them in place.
        inputs: What the step only reads: the batch, hyperparameters, seeds, and parameters that it does not write.
        outputs: What the step returns besides its state, or the first of it.
        digest: Equal for equal functions, in every process: of everything that decides what `function` computes. None
            where the adapter cannot tell; such a program is lowered at every start.
        is_deterministic: Whether two runs on equal arrays must give equal bits, whatever that costs.
        recomputes: Whether it computes values again to save memory, which a schedule for speed would undo.
        saves_memory: Whether a GPU's program is to need least memory, even where it is slower.
        tells_apart: Whether `function` says itself what each of several workers does on its own (`workers.each`), and
            what is common to all.
    """

    name: str
    function: Callable[[tuple, tuple], tuple[tuple, tuple]]
    state: tuple[TensorSpec, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    digest: str | None = None
    is_deterministic: bool = False
    recomputes: bool = False
    saves_memory: bool = False
    tells_apart: bool = False

    def with_batch(self, rows: int) -> "StepProgram":
        """The same program, whose inputs know their batch dim: the first, where a batch input is `rows` long there."""
        inputs = (
            replace(spec, batch_dim=0) if spec.role == "batch" and spec.shape[:1] == (rows,) else spec
            for spec in self.inputs
        )
        return replace(self, inputs=tuple(inputs))
