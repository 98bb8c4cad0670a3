"""The tape: what the loop has asked for and nobody has computed yet."""

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from trainingcompiler.frameworks.pytorch import cuda_autocast, devices
from trainingcompiler.frameworks.pytorch.arrays import tensor_of
from trainingcompiler.frameworks.pytorch.host import Place
from trainingcompiler.frameworks.pytorch.modules import Fingerprint
from trainingcompiler.frameworks.pytorch.structure import Structure, flatten, unflatten


class Slot:
    """One tensor that an entry of the tape produces.

    Attributes:
        meta: A fake tensor with its shape, dtype and `requires_grad`.
        device: Where torch would have it.
        value: The real tensor, once it has been computed.
        committed: Whether the entries behind it have left the tape, so that `value` is all there is.
        freed: Whether a `backward()` has freed the graph behind it.
        finite: Whether the program sees to it that no value is infinite or not a number, so that nobody need look.
        wrapper: A weak reference to the `DeferredTensor` that the loop holds.
    """

    __slots__ = ("__weakref__", "committed", "device", "finite", "freed", "meta", "value", "wrapper")

    def __init__(self, meta: torch.Tensor, device: torch.device = devices.CPU):
        self.meta = meta
        self.device = device
        self.value: torch.Tensor | None = None
        self.committed = False
        self.freed = False
        self.finite = False
        self.wrapper: weakref.ref | None = None

    @property
    def is_cut(self) -> bool:
        """Whether a gradient that should pass the tensor no longer can: torch would raise an error too."""
        return self.freed or (self.committed and self.meta.requires_grad)

    @property
    def live(self) -> bool:
        """Whether the loop still holds the tensor."""
        return self.wrapper is not None and self.wrapper() is not None


@dataclass(eq=False, slots=True)
class Input:
    """The value that a tensor had when a call received it.

    Attributes:
        array: A snapshot that XLA reads, shared with nobody.
        meta: Shape, dtype and device of the tensor.
    """

    array: Any
    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool = False
    device: torch.device = devices.CPU


@dataclass(frozen=True, slots=True)
class Ambient:
    """torch's modes around a call, which decide what the call computes."""

    grad: bool
    autocast: bool
    autocast_dtype: torch.dtype
    cuda_autocast: bool
    cuda_autocast_dtype: torch.dtype
    default_dtype: torch.dtype
    precision: str
    deterministic: bool

    @classmethod
    def now(cls) -> "Ambient":
        """The modes that are set at this moment in this thread."""
        return cls(
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_enabled("cuda"),
            torch.get_autocast_dtype("cuda"),
            torch.get_default_dtype(),
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
        )

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Sets the modes for a replay."""
        outside = Ambient.now()
        warns = torch.is_deterministic_algorithms_warn_only_enabled()
        try:
            self._set(warns)
            with (
                torch.set_grad_enabled(self.grad),
                torch.autocast("cpu", dtype=self.autocast_dtype, enabled=self.autocast or cuda_autocast.is_installed()),
            ):
                yield
        finally:
            outside._set(warns)

    def _set(self, warns: bool) -> None:
        torch.set_autocast_enabled("cuda", self.cuda_autocast)
        torch.set_autocast_dtype("cuda", self.cuda_autocast_dtype)
        torch.set_default_dtype(self.default_dtype)
        torch.set_float32_matmul_precision(self.precision)
        torch.use_deterministic_algorithms(self.deterministic, warn_only=warns)


@dataclass(eq=False, slots=True)
class Entry:
    """One call that the loop made: a module, a torch function, `backward`, `optimizer.step`.

    Attributes:
        function: What was called.
        structure: Of `(args, kwargs)`.
        leaves: `Slot`, `Input`, a tensor that is state (by identity), or a constant.
        ambient: torch's modes at the call.
        key: Everything that decides what the entry computes, but for which slots it reads.
        outputs: The slots of its tensor results; None until a capture has found them.
        result: The structure and leaves of what it returns, `Slot` in place of tensors, if a capture found them.
        modules: The modules that it calls, as far as is known.
        versions: The in-place writes to the parameters of the module at the call, where no guard sees them.
        closure: Tensors that the function reads without being given them, with snapshots of their values.
        prints: The fingerprints of the modules at the call.
        seed: A snapshot of the seed of its random numbers, if it draws any.
        numbers: Positions of leaves that are numbers which change between steps: inputs, not constants.
        frees: The slots whose graph the entry frees.
        where: The script's line.
        turn: How many entries before it call the same function.
        optimizers: The optimizers whose `step` it runs.
        in_torch: What torch runs in its place, where that is not `function`.
        device: Where the tensors of the call are.
        reads_gradients: Whether it reads `.grad`, which no slot stands for: it depends on everything before it.
    """

    function: Callable
    structure: Structure
    leaves: list[Any]
    ambient: Ambient
    key: tuple
    outputs: list[Slot] | None = field(default_factory=list)
    result: tuple[Structure, list[Any]] | None = None
    modules: tuple[torch.nn.Module, ...] = ()
    versions: tuple[int, ...] = ()
    closure: tuple[tuple[torch.Tensor, Input], ...] = ()
    prints: tuple[Fingerprint, ...] = ()
    seed: Input | None = None
    numbers: tuple[int, ...] = ()
    where: str | None = None
    turn: int = 0
    optimizers: tuple[torch.optim.Optimizer, ...] = ()
    in_torch: Callable | None = None
    device: torch.device = devices.CPU
    reads_gradients: bool = False

    def leaf(self, position: int) -> Any:
        """The leaf at a position; those of the closure come after the arguments'."""
        count = len(self.leaves)
        return self.leaves[position] if position < count else self.closure[position - count][1]

    def host_numbers(self) -> list[tuple[Place, float]]:
        """The changing numbers that the modules read of Python itself, as they were at the call."""
        return [item for fingerprint in self.prints for item in fingerprint.inputs]

    def slots(self) -> list[Slot]:
        """The slots that the entry reads."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Slot)]


class Tape:
    """Entries in the order in which the loop asked for them."""

    def __init__(self):
        self.entries: list[Entry] = []
        self.mutated = False  # an entry writes to what another one produced: slices are not safe

    def __bool__(self) -> bool:
        return bool(self.entries)

    def producers(self) -> dict[Slot, int]:
        """The index of the entry that produced each pending slot."""
        return {slot: index for index, entry in enumerate(self.entries) for slot in entry.outputs or ()}

    def live_slots(self) -> list[Slot]:
        """The pending slots that the loop still holds."""
        return [slot for entry in self.entries for slot in entry.outputs if slot.live]

    def committable(self) -> int:
        """How many entries from the start no gradient needs to pass any more.

        Neither one that a live value may still ask for, nor that of a backward which would stay on the tape.
        """
        limit = self._first([slot for slot in self.live_slots() if slot.meta.requires_grad and not slot.freed])
        while True:
            staying = [entry for entry in self.entries[limit:] if entry.function is torch.Tensor.backward]
            lower = min((self._first(entry.slots()) for entry in staying), default=limit)
            if lower >= limit:
                return limit
            limit = lower

    def _first(self, slots: list[Slot]) -> int:
        return min(self._gradient_path(slots), default=len(self.entries))

    def slice_for(self, slots: list[Slot]) -> list[Entry]:
        """The entries that the values of `slots` depend on, not going behind slots whose value is known."""
        if self.mutated:
            return list(self.entries)
        indices = self._ancestors(slots, lambda read: read.value is None)
        last = max((index for index in indices if self.entries[index].reads_gradients), default=-1)
        indices |= set(range(last))
        return [self.entries[index] for index in sorted(indices)]

    def functions_behind(self, slot: Slot) -> list[Callable]:
        """What the gradient of a slot passes through."""
        return [self.entries[index].function for index in self._gradient_path([slot])]

    def free(self, slot: Slot) -> None:
        """Notes that a `backward()` has freed the graph behind `slot`: no gradient passes its ancestors any more."""
        ancestors = self._gradient_path([slot])
        for index in ancestors:
            for output in self.entries[index].outputs:
                output.freed = True
        spent = {output for index in ancestors for output in self.entries[index].outputs}
        for entry in self.entries:  # whatever else was computed from them cannot be differentiated either
            if any(read in spent for read in entry.slots()):
                for output in entry.outputs:
                    output.freed = True
                    spent.add(output)

    def _gradient_path(self, slots: list[Slot]) -> set[int]:
        """The entries that a gradient of any of `slots` passes through: a detached value ends it."""
        return self._ancestors(slots, lambda read: read.meta.requires_grad)

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


def replay(entry: Entry, resolve: Callable[[Any, int], Any]) -> Any:
    """Runs an entry again.

    Args:
        entry: What to run.
        resolve: `(leaf, position)` to the value to pass in its place.

    Returns:
        What the entry's function returns.
    """
    leaves = [resolve(leaf, position) for position, leaf in enumerate(entry.leaves)]
    args, kwargs = unflatten(entry.structure, iter(leaves))
    with entry.ambient.entered():
        return entry.function(*args, **kwargs)


def tensors_in(result: Any) -> list[torch.Tensor]:
    """The distinct tensors in a call's result, in order; they correspond to `Entry.outputs`."""
    leaves, _ = flatten(result)
    distinct = {id(leaf): leaf for leaf in leaves if isinstance(leaf, torch.Tensor)}
    return list(distinct.values())


def run_in_torch(entry: Entry) -> None:
    """Runs an entry as torch would have, gradient history included, and gives its slots their values."""

    def resolve(leaf: Any, _: int) -> Any:
        if isinstance(leaf, Slot):
            return leaf.value
        if isinstance(leaf, Input):
            return tensor_of(leaf.array, leaf.device).clone()
        return leaf

    with contextlib.ExitStack() as stack:
        if entry.seed is not None:
            gpus = [] if entry.device.type == "cpu" else [entry.device]
            stack.enter_context(torch.random.fork_rng(devices=gpus))
            torch.manual_seed(int(entry.seed.array))
        for fingerprint in entry.prints:
            stack.enter_context(fingerprint.restored())
        if entry.in_torch is not None:
            entry = dataclasses.replace(entry, function=entry.in_torch)
        results = tensors_in(replay(entry, resolve))
    for slot, tensor in zip(entry.outputs or (), results, strict=False):
        slot.value = tensor
        slot.committed = True
