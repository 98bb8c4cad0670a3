"""What is on a tape: calls, the values that they give, and the snapshots of what they were given."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from trainingcompiler.frameworks.pytorch.interop import devices
from trainingcompiler.frameworks.pytorch.interop.arrays import laid_out, tensor_of
from trainingcompiler.frameworks.pytorch.interop.gradients import BACKWARD
from trainingcompiler.frameworks.pytorch.interop.pytree import TreeDef, unflatten
from trainingcompiler.frameworks.pytorch.interop.torch_modes import TorchModes
from trainingcompiler.frameworks.pytorch.tape.call_key import slot_key

if TYPE_CHECKING:
    from trainingcompiler.frameworks.pytorch.tape.recording import Call


class Geometry(NamedTuple):
    """How a tensor lies in memory, and whether a gradient passes it; `strides` count elements."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Geometry":
        """That of a real or a fake tensor."""
        return cls(tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad)


class Slot:
    """One tensor that an entry of the tape produces.

    Attributes:
        meta: A fake tensor with its geometry.
        geometry: Likewise: to ask a fake tensor is a call of a torch function, which is seen.
        requires_grad: Whether a gradient passes it.
        device: Where torch would have it.
        number: Its number among those of its tape.
        producer: The index of the entry of the tape that produces it.
        key: Its own in the keys of calls.
        value: The real tensor, once it has been computed.
        committed: Whether the entries behind it have left the tape, so that `value` is all there is.
        freed: Whether a `backward()` has freed the graph behind it.
        memory: The state tensor, or the other slot, that it is a view of; None if its memory is its own.
        late: What its backward needs, if a step has changed parameters behind it.
        finite: Whether the program sees to it that no value is infinite or not a number, so that nobody need look.
        wrapper: A weak reference to the `DeferredTensor` that the loop holds.
    """

    __slots__ = (
        "__weakref__",
        "committed",
        "device",
        "finite",
        "freed",
        "geometry",
        "key",
        "late",
        "memory",
        "meta",
        "number",
        "producer",
        "requires_grad",
        "value",
        "wrapper",
    )

    def __init__(
        self,
        meta: torch.Tensor,
        device: torch.device = devices.CPU,
        number: int = -1,
        geometry: Geometry | None = None,
    ):
        self.meta = meta
        self.geometry = geometry = geometry or Geometry.of(meta)
        self.requires_grad = geometry.requires_grad
        self.device = device
        self.number = number
        self.producer = -1
        self.key = slot_key(number)
        self.value: torch.Tensor | None = None
        self.committed = False
        self.freed = False
        self.finite = False
        self.late: Any = None
        self.memory: Any = None
        self.wrapper: weakref.ref | None = None

    def __repr__(self) -> str:
        return f"%{self.number}"

    @property
    def is_cut(self) -> bool:
        """Whether a gradient that should pass the tensor no longer can: torch would raise an error too."""
        return self.freed or (self.committed and self.requires_grad)

    @property
    def held(self) -> Any:
        """The tensor that the loop holds of it, if it still does."""
        return None if self.wrapper is None else self.wrapper()

    @property
    def live(self) -> bool:
        """Whether the loop still holds the tensor."""
        return self.held is not None


@dataclass(eq=False, slots=True)
class Input:
    """The value that a tensor had when a call received it.

    Attributes:
        array: A snapshot that XLA reads, shared with nobody.
        shape, dtype, requires_grad, device: Those of the tensor.
        strides: Where its elements lie, if not one after another: what is computed from it lies likewise.
        origin: The module that was given the tensor, and the position or the key of the argument, where that is known.
    """

    array: Any
    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool = False
    device: torch.device = devices.CPU
    origin: tuple[Any, Any] | None = None
    strides: tuple[int, ...] | None = None

    def __repr__(self) -> str:
        return f"input {_type_of(self)}"

    def tensor(self) -> torch.Tensor:
        """A tensor of its own with these values, laid out as the one that was given."""
        values = tensor_of(self.array, self.device)
        return values.clone() if self.strides is None else laid_out(values.clone(), self.strides)


@dataclass(eq=False, slots=True)
class Entry:
    """One call that the loop made: a torch function, `backward`, `optimizer.step`; a module, for a planner.

    Attributes:
        function: What was called.
        structure: Of `(args, kwargs)`.
        leaves: `Slot`, `Input`, a tensor that is state (by identity), or a constant.
        modes: torch's modes at the call.
        call: The call in the recording; what decides which program the tape is. None for entries that a planner holds.
        outputs: The slots of its tensor results.
        modules: The modules that it calls, as far as is known.
        seed: The seed of its random numbers, if it draws any.
        numbers: Positions of leaves that are numbers which change between steps: inputs, not constants.
        where: The script's line.
        optimizers: The optimizers whose `step` it runs.
        groups: For each of them its hyperparameters at the call: a scheduler may change them before the tape runs.
        device: Where the tensors of the call are.
        reads_gradients: Whether it reads `.grad`, which no slot stands for: it depends on everything before it.
        region: The checkpointed block that it belongs to; 0 is none.
        writes: Positions of the leaves that the call writes to.
        piece: Python that backward runs, which the call puts into the graph; or whose gradients it is about.
        is_in_backward: Whether backward runs the call: it belongs to the last backward before it.
        second: Of a call that a checkpointed block makes only when it runs again: the block's number, and how many
            calls of its first run come before.
    """

    function: Callable
    structure: TreeDef
    leaves: list[Any]
    modes: TorchModes
    call: "Call | None" = None
    outputs: list[Slot] = field(default_factory=list)
    modules: tuple[torch.nn.Module, ...] = ()
    seed: int | None = None
    numbers: tuple[int, ...] = ()
    where: str | None = None
    optimizers: tuple[torch.optim.Optimizer, ...] = ()
    groups: tuple[list[dict], ...] = ()
    device: torch.device = devices.CPU
    reads_gradients: bool = False
    region: int = 0
    writes: tuple[int, ...] = ()
    piece: Any = None
    is_in_backward: bool = False
    second: tuple[int, int] | None = None

    def __str__(self) -> str:
        """One line: `%3 = linear(%2, float32[4, 8], float32[4])  # float32[2, 4], train.py:12`."""
        args, kwargs = unflatten(self.structure, iter([_Text(_leaf_text(leaf)) for leaf in self.leaves]))
        given = [*map(repr, args), *(f"{name}={value!r}" for name, value in kwargs.items())]
        name = getattr(self.function, "__qualname__", None) or getattr(self.function, "__name__", repr(self.function))
        results = f"{', '.join(map(repr, self.outputs))} = " if self.outputs else ""
        comment = ", ".join([*(_type_of(slot.meta) for slot in self.outputs), *([self.where] if self.where else [])])
        return f"{results}{name}({', '.join(given)})" + (f"  # {comment}" if comment else "")

    def slots(self) -> list[Slot]:
        """The slots that the entry reads."""
        return [leaf for leaf in self.leaves if type(leaf) is Slot]

    @property
    def acts_on_graph(self) -> bool:
        """Whether it sets `requires_grad` or has no results, as a hook: what depends on it cannot be seen in leaves."""
        return not (self.outputs or self.writes) or getattr(self.function, "__name__", "") == "requires_grad_"

    @property
    def writes_state(self) -> bool:
        """Whether it writes to a tensor that is no result of the tape, or to gradients."""
        if self.reads_gradients or self.optimizers or self.function is BACKWARD:
            return True
        return any(isinstance(memory_of(self.leaves[position]), torch.Tensor) for position in self.writes)


class _Text(str):
    """Text that stands for a value, and is shown as it is within a list."""

    def __repr__(self) -> str:
        return str(self)


def _type_of(tensor: Any) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _leaf_text(leaf: Any) -> str:
    if isinstance(leaf, torch.Tensor):
        return f"state {_type_of(leaf)}"
    if isinstance(leaf, torch.nn.Module | torch.optim.Optimizer):
        return type(leaf).__name__
    return getattr(leaf, "__qualname__", None) or repr(leaf)


def memory_of(leaf: Any) -> Any:
    """The tensor or slot whose memory a leaf of an entry is: itself, unless it is a view."""
    return leaf.memory if type(leaf) is Slot and leaf.memory is not None else leaf


def live_among(entries: list[Entry]) -> list[Slot]:
    """The slots that entries produce and the loop still holds."""
    found = [slot for entry in entries for slot in entry.outputs if slot.wrapper is not None]
    return [slot for slot in found if slot.wrapper is not None and slot.wrapper() is not None]


def step_ends(optimizer: torch.optim.Optimizer) -> None:
    """The last entry of a recorded step: the gradients of the optimizer's parameters have been used."""
