"""The tape: what the loop has asked for and nobody has computed yet."""

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from trainingcompiler.errors import CaptureError
from trainingcompiler.frameworks.pytorch.interop import devices
from trainingcompiler.frameworks.pytorch.interop.gradients import BACKWARD, stored_gradient
from trainingcompiler.frameworks.pytorch.interop.pytree import TreeDef, flatten, unflatten
from trainingcompiler.frameworks.pytorch.interop.torch_modes import TorchModes

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
        kind: What a key has of it.
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
        "kind",
        "late",
        "memory",
        "meta",
        "number",
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
        self.kind: tuple = ("slot", number)
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
        origin: The module that was given the tensor, and the position or the key of the argument, where that is known.
    """

    array: Any
    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool = False
    device: torch.device = devices.CPU
    origin: tuple[Any, Any] | None = None

    def __repr__(self) -> str:
        return f"input {_type_of(self)}"


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
        return not self.outputs or getattr(self.function, "__name__", "") == "requires_grad_"

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


class Tape:
    """Entries in the order in which the loop asked for them.

    Attributes:
        entries: Likewise.
        mutated: Whether an entry writes to what another one produced, or to state: slices are not safe.
        written: The storages of state that entries write to, by address.
        place: The last call's place in the recording.
        places: Those of the calls before each entry.
        roots: The modules whose calls are on the tape.
        state: Tensors that entries know by identity because they write to them, by identity.
        inputs: The snapshots of tensors, by identity, with the version that each was taken of.
        read: Real tensors that calls with gradients have read, with their version then, and the snapshots.
        has_pieces: Whether the tape has Python that backward runs.
        is_in_backward: Whether that is being recorded.
        asked: Why torch is to run the step, if Python in backward has done what is not compiled.
        new_leaves: Results that `requires_grad_()` has made leaves: they have a `.grad`, which a program does not give.
        grad_flags: `requires_grad` of each state tensor when the tape met it first, by identity.
        region: The checkpointed block that is being recorded, if that is known.
        region_count: The number of the last block.
        block: Identifies it.
        blocks: The checkpointed blocks, by their numbers.
        second_run: Of the block whose Python is running again.
        ran_again: The blocks whose Python has.
    """

    def __init__(self, place: "Call"):
        self.entries: list[Entry] = []
        self.place = place
        self.places: list[Call] = []
        self.roots: list[torch.nn.Module] = []
        self.state: dict[int, torch.Tensor] = {}
        self.region = self.region_count = 0
        self.block: Any = None
        self.blocks: dict[int, Any] = {}
        self.second_run: Any = None
        self.ran_again: set[int] = set()
        self.mutated = False
        self.written: set[int] = set()
        self.inputs: dict[int, tuple[torch.Tensor, int, Input, tuple]] = {}
        self.read: list[tuple[torch.Tensor, int, Input]] = []
        self.grad_flags: dict[int, tuple[torch.Tensor, bool]] = {}
        self.new_leaves: list[Slot] = []
        self.has_pieces = self.is_in_backward = False
        self.asked: CaptureError | None = None
        self.slot_count = 0

    def __bool__(self) -> bool:
        return bool(self.entries)

    def __str__(self) -> str:
        return "\n".join(map(str, self.entries))

    def producers(self) -> dict[Slot, int]:
        """The index of the entry that produced each pending slot."""
        return {slot: index for index, entry in enumerate(self.entries) for slot in entry.outputs}

    def live_slots(self) -> list[Slot]:
        """The pending slots that the loop still holds."""
        return live_among(self.entries)

    def committable(self) -> int:
        """How many entries from the start no gradient needs to pass any more.

        Neither one that a live value may still ask for, nor that of a backward which would stay on the tape.
        """
        wanted = [slot for slot in self.live_slots() if slot.requires_grad and not slot.freed]
        if not wanted:
            return len(self.entries)
        limit = self._first(wanted)
        while True:
            staying = [entry for entry in self.entries[limit:] if entry.function is BACKWARD]
            lower = min((self._first(entry.slots()) for entry in staying), default=limit)
            if lower >= limit:
                return limit
            limit = lower

    def _first(self, slots: list[Slot]) -> int:
        return min(self._gradient_path(slots), default=len(self.entries))

    def slice_for(self, slots: list[Slot]) -> list[Entry]:
        """The entries that the values of `slots` depend on, not going behind slots whose value is known."""
        producers = self.producers()
        if any(slot in producers and self.entries[producers[slot]].is_in_backward for slot in slots):
            return list(self.entries)
        if self.mutated:
            if any(entry.optimizers for entry in self.entries):
                return list(self.entries)
            return self._slice_with_writes(slots)
        indices = self._ancestors(slots, lambda read: read.value is None)
        last = max((index for index in indices if self.entries[index].reads_gradients), default=-1)
        indices |= set(range(last))
        return [self.entries[index] for index in sorted(indices)]

    def _slice_with_writes(self, slots: list[Slot]) -> list[Entry]:
        """The entries behind `slots`, those that write to memory which one of these reads included."""
        writers: dict[int, list[int]] = {}  # by the identity of what has the memory
        for index, entry in enumerate(self.entries):
            for position in entry.writes:
                writers.setdefault(id(memory_of(entry.leaves[position])), []).append(index)
        producers = self.producers()
        found: set[int] = set()
        pending: list[int] = []

        def need(slot: Slot) -> None:
            if slot in producers:
                pending.extend((producers[slot], *writers.get(id(memory_of(slot)), ())))

        for slot in slots:
            need(slot)
        while pending:
            index = pending.pop()
            if index in found:
                continue
            found.add(index)
            entry = self.entries[index]
            if entry.reads_gradients:
                pending.extend(range(index))
            for leaf in entry.leaves:
                if type(leaf) is Slot:
                    need(leaf)
                elif isinstance(leaf, torch.Tensor):
                    pending.extend(writer for writer in writers.get(id(leaf), ()) if writer < index)
        return [self.entries[index] for index in sorted(found)]

    def entries_behind(self, slot: Slot) -> list[Entry]:
        """What the gradient of a slot passes through."""
        return [self.entries[index] for index in self._gradient_path([slot])]

    def behind(self, slots: list[Slot]) -> set[int]:
        """The indices of all entries that slots depend on."""
        return self._ancestors(slots, lambda read: True)

    def with_gradients(self) -> set[int]:
        """The tensors whose gradients the backwards on the tape compute, by identity."""
        found: set[int] = set()
        for entry in self.entries:
            if entry.function is BACKWARD:
                for index in self._gradient_path(entry.slots()):
                    found |= {id(leaf) for leaf in self.entries[index].leaves if isinstance(leaf, torch.Tensor)}
        return found

    def uses_stored_gradients(self, tensors: list[torch.Tensor]) -> bool:
        """Whether entries step or clip by gradients of any of these tensors that are there, outside of the tape."""
        used: set[int] = set()
        for entry in self.entries:
            for optimizer in entry.optimizers:
                used.update(id(parameter) for group in optimizer.param_groups for parameter in group["params"])
            if entry.reads_gradients:
                used.update(id(leaf) for leaf in entry.leaves if isinstance(leaf, torch.Tensor))
        return bool(used) and any(id(tensor) in used and stored_gradient(tensor) is not None for tensor in tensors)

    def free(self, slot: Slot) -> None:
        """Notes that a `backward()` has freed the graph behind `slot`: no gradient passes its ancestors any more."""
        ancestors = self._gradient_path([slot])
        for index in ancestors:
            for output in self.entries[index].outputs:
                output.freed = True
        spent = {output for index in ancestors for output in self.entries[index].outputs}
        for entry in self.entries:  # what else was computed from them cannot be differentiated either, but for detached
            rest = [output for output in entry.outputs if output.requires_grad and not output.freed]
            if rest and not spent.isdisjoint(entry.slots()):
                for output in rest:
                    output.freed = True
                    spent.add(output)

    def _gradient_path(self, slots: list[Slot]) -> set[int]:
        """The entries that a gradient of any of `slots` passes through: a detached value ends it."""
        return self._ancestors(slots, lambda read: read.requires_grad)

    def _ancestors(self, slots: list[Slot], follows: Callable[[Slot], bool]) -> set[int]:
        producers = self.producers()
        found: set[int] = set()
        pending = [producers[slot] for slot in slots if slot in producers]
        while pending:
            index = pending.pop()
            if index not in found:
                found.add(index)
                pending += [
                    producers[read] for read in self.entries[index].slots() if read in producers and follows(read)
                ]
        return found


def live_among(entries: list[Entry]) -> list[Slot]:
    """The slots that entries produce and the loop still holds."""
    found = [slot for entry in entries for slot in entry.outputs if slot.wrapper is not None]
    return [slot for slot in found if slot.wrapper is not None and slot.wrapper() is not None]


def replay(entry: Entry, resolve: Callable[[Any, int], Any], piece: Any = None) -> Any:
    """Runs an entry again.

    Args:
        entry: What to run.
        resolve: `(leaf, position)` to the value to pass in its place.
        piece: What backward is to run, for an entry that puts something of it into the graph.

    Returns:
        What the entry's function returns.
    """
    leaves = [resolve(leaf, position) for position, leaf in enumerate(entry.leaves)]
    args, kwargs = unflatten(entry.structure, iter(leaves))
    with entry.modes.around():
        if getattr(entry.function, "takes_piece", False):
            return entry.function(piece, *args, **kwargs)
        return entry.function(*args, **kwargs)


@contextlib.contextmanager
def as_called(entry: Entry) -> Iterator[None]:
    """Gives the optimizers that an entry steps the hyperparameters that they had at the call."""
    with contextlib.ExitStack() as stack:
        for optimizer, groups in zip(entry.optimizers, entry.groups, strict=False):
            stack.enter_context(with_groups(optimizer, groups))
        yield


@contextlib.contextmanager
def with_groups(optimizer: torch.optim.Optimizer, groups: list[dict]) -> Iterator[None]:
    """Gives an optimizer the hyperparameters of an earlier moment for a while."""
    now = [dict(group) for group in optimizer.param_groups]
    if len(now) != len(groups) or all(map(_same_items, now, groups)):
        yield
        return
    for group, then in zip(optimizer.param_groups, groups, strict=True):
        group.update(then)
    try:
        yield
    finally:
        for group, later in zip(optimizer.param_groups, now, strict=True):
            group.update(later)


def _same_items(one: dict, other: dict) -> bool:
    return len(one) == len(other) and all(name in one and one[name] is value for name, value in other.items())


def tensors_in(result: Any) -> list[torch.Tensor]:
    """The distinct tensors in a call's result, in order; they correspond to `Entry.outputs`."""
    leaves, _ = flatten(result)
    distinct = {id(leaf): leaf for leaf in leaves if isinstance(leaf, torch.Tensor)}
    return list(distinct.values())


def results_of(entry: Entry, result: Any) -> list[torch.Tensor]:
    """The tensors of a call's result that `Entry.outputs` stand for: those that are not arguments handed back."""
    tensors = tensors_in(result)
    shape = None if entry.call is None else entry.call.shape
    return tensors if shape is None else [tensors[index] for index in shape.fresh if index < len(tensors)]


@dataclass(slots=True)
class Part:
    """What one piece of backward's Python has asked torch for, on the tape behind its backward.

    Attributes:
        piece: Likewise.
        given: The slots of the gradients that it was given.
        positions: Of which of its results those are the gradients.
        calls: Indices of the entries in between.
        returned: The leaves of the gradients that it has returned; None while it is still running.
        end: The index of the entry that has them.
    """

    piece: Any
    given: list[Slot]
    positions: tuple[int, ...]
    calls: list[int] = field(default_factory=list)
    returned: list[Any] | None = None
    end: int = -1


def parts_of(entries: list[Entry], backward: int) -> list[Part]:
    """The pieces of Python that the backward at an index runs, in order."""
    found: list[Part] = []
    for index in range(backward + 1, len(entries)):
        entry = entries[index]
        if not entry.is_in_backward:
            break
        if entry.second is not None:
            continue
        if entry.piece is not None and entry.outputs and entry.function.__name__ == "incoming":
            found.append(Part(entry.piece, entry.outputs, entry.leaves[-1]))
        elif entry.piece is not None and entry.function.__name__ == "outgoing":
            found[-1].returned, found[-1].end = entry.leaves, index
        else:
            found[-1].calls.append(index)
    return found


def again_of(entries: list[Entry], start: int, end: int) -> list[int]:
    """The indices of what the checkpointed block at `entries[start:end]` computes when it runs again."""
    others = [i for i, entry in enumerate(entries) if entry.second and entry.second[0] == entries[start].region]
    return [*range(start, start + entries[others[0]].second[1]), *others] if others else list(range(start, end))


class ReplayedPiece:
    """Stands for a piece of backward's Python while torch, or a capture, runs the tape."""

    _suspended: tuple[torch.Tensor, Any] | None = None

    def suspend(self, leaf: torch.Tensor) -> None:
        """Takes a parameter's own hooks away: they have run when the tape was written."""
        self._suspended = leaf, leaf._backward_hooks
        leaf._backward_hooks = None

    def resume(self) -> None:
        """Gives them back."""
        if self._suspended is not None:
            leaf, hooks = self._suspended
            leaf._backward_hooks = hooks
            self._suspended = None


def copied(entry: Entry, **changes: Any) -> Entry:
    """An entry like another one."""
    return dataclasses.replace(entry, **changes)


def step_ends(optimizer: torch.optim.Optimizer) -> None:
    """The last entry of a recorded step: the gradients of the optimizer's parameters have been used."""
