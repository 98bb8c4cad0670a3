"""What tells a call of the tape from another one: its key in the recording.

Of each leaf of the arguments the key has what is the same at every run of it: which slot of the tape it is, the shape
of an input, the identity of state, the value of a constant. A key is compared at every call of every step, so it is a
tuple, and so is all that it is made of: Python compares these without running any code of ours.
"""

import enum
import math
from typing import Any, NamedTuple

import torch

from trainingcompiler.frameworks.pytorch.interop.pytree import TreeDef
from trainingcompiler.frameworks.pytorch.interop.torch_modes import TorchModes


class CallKey(NamedTuple):
    """A call: equal keys have the same result, but for the values of tensors.

    Attributes:
        function: What is called.
        structure: Of `(args, kwargs)`.
        leaves: The keys of its leaves, in order.
        modes: torch's modes.
        region: The checkpointed block that the call is in; 0 outside of any.
        optimizers: What is known of the optimizers whose `step` it is.
    """

    function: Any
    structure: TreeDef | None
    leaves: tuple[tuple, ...]
    modes: TorchModes | None
    region: int = 0
    optimizers: tuple = ()

    def with_numbers(self, positions: tuple[int, ...], leaves: list[Any]) -> "CallKey":
        """The key with only the sign of some floats, which are inputs: a forward may ask whether one is zero.

        Args:
            positions: Which leaves are such floats, where they are floats.
            leaves: What the call is given.
        """
        keys = list(self.leaves)
        for position in positions:
            value = leaves[position]
            if type(value) is float and value != 0.0:
                keys[position] = ("number", value > 0)
        return self._replace(leaves=tuple(keys))


class StateKey(NamedTuple):
    """A tensor or an object that is known by identity.

    Attributes:
        number: Another one for each that there has ever been.
        shape: Of a tensor; an object's type.
        strides: In elements.
        dtype: Of a tensor.
        requires_grad: Likewise.
        tag: Tells the key from those of other leaves.
    """

    number: int
    shape: Any
    strides: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    requires_grad: bool = False
    tag: str = "state"


class InputKey(NamedTuple):
    """A tensor whose values are an input.

    Attributes:
        shape, dtype, device: Those of the tensor.
        strides: In elements, if its elements do not lie one after another.
        met: Its number among those of the tape, if it may be met again.
        tag: Tells the key from those of other leaves.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    strides: tuple[int, ...] | None = None
    met: int | None = None
    tag: str = "input"


def slot_key(number: int) -> tuple:
    """The key of a result of the tape."""
    return ("slot", number)


def again_key(number: int) -> tuple:
    """The key of an input that the tape has met before, by its number."""
    return ("again", number)


def is_met(key: tuple) -> bool:
    """Whether a key is that of an input which may be met again, or has been."""
    return type(key) is InputKey and key.met is not None or key[0] == "again"


def constant_key(leaf: Any) -> tuple:
    """The key of a plain value, which is its value: with its type, since `1 == True` and `0.0 == -0.0`."""
    kind = type(leaf)
    if kind is float:
        if leaf != leaf:
            return (float, "nan")
        return (float, leaf) if leaf != 0.0 or math.copysign(1.0, leaf) > 0 else (float, "-0")
    return (kind, repr(leaf) if kind is complex else leaf)


def is_plain(leaf: Any) -> bool:
    """Whether an object is known by its value."""
    return isinstance(leaf, _PLAIN)


_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), type, enum.Enum, range)
