"""Captures entries of a tape as one graph over named inputs."""

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from trainingcompiler.errors import CaptureError, PassingCaptureError
from trainingcompiler.frameworks.pytorch.capture import optimizer_init, optimizers
from trainingcompiler.frameworks.pytorch.capture.fake_mode import FakeTensors
from trainingcompiler.frameworks.pytorch.capture.traced_float import TracedFloat
from trainingcompiler.frameworks.pytorch.graph.ir import Graph
from trainingcompiler.frameworks.pytorch.interop.gradients import BACKWARD, real_gradient
from trainingcompiler.frameworks.pytorch.tape.entries import Entry, Input, Slot, step_ends
from trainingcompiler.frameworks.pytorch.tape.replay import Part, ReplayedPiece, as_called, parts_of, replay, results_of


@dataclass(frozen=True, slots=True, eq=False)
class LiftedTensor:
    """A real tensor that the step reads, by identity.

    Attributes:
        tensor: Refers to the real tensor.
        gradient_of: Refers to the tensor whose `.grad` it was; a gradient is found again through it, not by identity.
        value: Its number when the step starts.
        new_value: Its number when the step ends; equal to `value` if the step does not write it.
    """

    tensor: weakref.ref
    gradient_of: weakref.ref | None
    value: int
    new_value: int


@dataclass(frozen=True, slots=True)
class FloatSource:
    """A Python number that the step reads: a leaf of an entry, or an optimizer's hyperparameter.

    Attributes:
        entry: The index of the entry.
        position: The leaf's position, or the path of the hyperparameter in the optimizer's `param_groups`.
        optimizer: Refers to the optimizer, for a hyperparameter.
    """

    entry: int
    position: Any
    optimizer: weakref.ref | None = None


@dataclass(slots=True)
class CapturedStep:
    """Entries as a graph.

    Attributes:
        graph: The functional ATen graph.
        lifted: The real tensors it reads and writes.
        leaves: `(entry index, leaf position, value)` of every snapshot it reads.
        seeds: `(entry index, value)` of every seed.
        numbers: `(source, value)` of every number.
        outputs: The value number of each output slot of each entry, in order of the entries.
        gradients: `(parameter, value)`: what the parameter's `.grad` is when the step ends, where the step has
            put a new tensor there; the value is None where it has put None there.
    """

    graph: Graph
    lifted: list[LiftedTensor]
    leaves: list[tuple[int, int, int]]
    seeds: list[tuple[int, int]]
    numbers: list[tuple[FloatSource, int]]
    outputs: dict[Slot, int]
    gradients: list[tuple[weakref.ref, int | None]]


def capture(
    entries: list[Entry],
    constants: Callable[[torch.optim.Optimizer], frozenset] = lambda _: frozenset(),
    flags: dict[int, tuple[torch.Tensor, bool]] | None = None,
    order: list[tuple[int, bytes | int]] | None = None,
) -> CapturedStep:
    """Replays entries on fake tensors and records what torch dispatches.

    Args:
        entries: What to capture; the slots that they read must be their own or have values.
        constants: Gives the paths of an optimizer's hyperparameters that have to be constants.
        flags: `requires_grad` of state tensors when the first entry was recorded, by identity.
        order: Gets the pieces of Python that the last backward runs, which do nothing then; see `backward_order`.

    Returns:
        The graph and what its inputs and outputs are.

    Raises:
        CaptureError: The entries cannot be expressed as a pure function of tensors and numbers.
        ConcretizationError: A number has to be a constant.
    """
    return _Capture(entries, constants, flags or {}, order).run()


class _Capture:
    """One capture: entries, replayed on fake tensors, and what has been found out about them so far.

    Attributes:
        fake_tensors: Stand for every real tensor that the entries meet.
        fakes: The fake tensor of each slot and input.
        leaves: Which leaves of entries are inputs of the graph: entry, position and value.
        seeds: Which entries draw, and the value of the seed.
        numbers: Where the floats that are inputs come from, and their values.
        pieces: Python that backward runs, by identity.
    """

    def __init__(
        self,
        entries: list[Entry],
        constants: Callable[[torch.optim.Optimizer], frozenset],
        flags: dict[int, tuple[torch.Tensor, bool]],
        order: list[tuple[int, bytes | int]] | None,
    ):
        self._entries, self._constants, self._order = entries, constants, order
        self.fake_tensors = FakeTensors()
        self.fake_tensors.grad_flags = flags
        self._recorder = self.fake_tensors.recorder
        self._recorder.until = replay.__code__
        self.fakes: dict[Any, torch.Tensor] = {}
        self.leaves: list[tuple[int, int, int]] = []
        self.seeds: list[tuple[int, int]] = []
        self.numbers: list[tuple[FloatSource, int]] = []
        self.pieces: dict[int, _Captured] = {}
        self._seed_fakes: dict[int, torch.Tensor] = {}

    def run(self) -> CapturedStep:
        """Replays all entries; see `capture`."""
        entries, index = self._entries, 0
        while index < len(entries):
            end = index + 1
            while end < len(entries) and not entries[index].optimizers and _runs_along(entries[index], entries[end]):
                end += 1
            for entry in entries[index:end]:
                for optimizer in entry.optimizers:
                    optimizer_init.prepare(optimizer, self.fake_tensors.has_gradient)
            self.fake_tensors.device = entries[index].device
            with self.fake_tensors.recording(), _no_new_state(entries[index:end]):
                self._run_along(index, end)
            index = end
        return self._found()

    def _found(self) -> CapturedStep:
        recorder = self._recorder
        with self.fake_tensors.recording():
            outputs = {
                slot: recorder.value_of(self.fake_tensors.fake(self.fakes[slot]))
                for entry in self._entries
                for slot in entry.outputs
                if slot in self.fakes
            }
            lifted, gradients = _state(self.fake_tensors)
        self.fakes.clear()
        self.pieces.clear()  # they know this object
        self.fake_tensors.let_go()
        if recorder.missing is not None:
            raise recorder.missing
        if any(item.tensor() is None for item in lifted):
            raise CaptureError(
                reason="the step makes a tensor of host data while it runs (torch.from_numpy and the like); a compiled "
                "step would use the first data for ever"
            )
        return CapturedStep(recorder.graph, lifted, self.leaves, self.seeds, self.numbers, outputs, gradients)

    def _run_along(self, index: int, end: int) -> None:
        """Replays entries of one device, a checkpointed block as a whole."""
        entries = self._entries
        while index < end:
            if entries[index].is_in_backward:  # its backward has run it
                index += 1
                continue
            if self._order is not None:
                self._order.clear()
            for part in parts_of(entries, index) if entries[index].function is BACKWARD else ():
                self.pieces[id(part.piece)].parts.append(part)
            region = entries[index].region
            stop = index + 1
            while region and stop < end and entries[stop].region == region:
                stop += 1
            if region:
                self._run_block(index, stop)
            else:
                self._run_entry(index, entries[index])
            index = stop

    def _run_entry(self, index: int, entry: Entry) -> None:
        """Replays one entry, and notes what its slots are."""
        recorder = self._recorder
        recorder.where = entry.where
        if entry.seed is not None:
            recorder.seed_with(self._seed(index))
        with contextlib.ExitStack() as prepared:
            prepared.enter_context(as_called(entry))
            for optimizer in entry.optimizers if entry.function is not step_ends else ():
                of = functools.partial(self._hyperparameter, index, weakref.ref(optimizer))
                prepared.enter_context(optimizers.traced(optimizer, of, self._constants(optimizer)))
            if entry.optimizers:
                prepared.enter_context(self.fake_tensors.numbers_in_steps())
            resolve = functools.partial(self._resolve, index, entry)
            results = results_of(entry, replay(entry, resolve, self._piece_of(index, entry)))
        if entry.outputs is None:  # a whole step, of which nobody knows yet what it returns
            entry.outputs = [Slot(fake, entry.device) for fake in results]
        if entry.seed is not None:
            recorder.seed_with(None)
        assert len(results) >= len(entry.outputs)
        self.fakes.update(zip(entry.outputs, results, strict=False))

    def _run_block(self, start: int, end: int) -> None:
        """Replays a checkpointed block, in a checkpoint of its own."""
        entries, fakes, order = self._entries, self.fakes, self._order
        # What the block is given, and what of its results is wanted outside.
        block = entries[start:end]
        inside = {slot for entry in block for slot in entry.outputs}
        given = list({slot: None for entry in block for slot in entry.slots() if slot not in inside})
        needed = {slot for entry in entries[end:] for slot in entry.slots()}
        results = [slot for slot in inside if slot in needed or slot.live]
        for index in range(start, end):  # what is computed again has to read the same inputs of the graph
            for position, leaf in enumerate(entries[index].leaves):
                if type(leaf) is Input or (type(leaf) is Slot and leaf not in inside):
                    self._resolve(index, entries[index], leaf, position)
        runs = [0]

        def recompute(*arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
            outer = {slot: fakes.get(slot) for slot in given}
            fakes.update(zip(given, arguments, strict=True))
            runs[0] += 1
            place = len(order or ())
            for index in range(start, end):
                if order is not None and runs[0] > 1:  # in backward, up to where torch stops it
                    order[place:] = [(start, index + 1 - start)]
                self._run_entry(index, entries[index])
            found = tuple(fakes[slot] for slot in results)
            fakes.update({slot: fake for slot, fake in outer.items() if fake is not None})
            return found

        with torch.enable_grad() if entries[start].modes.grad else torch.no_grad():
            found = checkpoint(recompute, *[fakes[slot] for slot in given], use_reentrant=False)
        fakes.update(zip(results, found, strict=True))

    def run_part(self, part: Part, gradients: Any) -> Any:
        """Replays what a piece of backward's Python has asked torch for, on the gradients that it is given now."""
        self.fakes.update((slot, gradients[at]) for slot, at in zip(part.given, part.positions, strict=True))
        for index in part.calls:
            self._run_entry(index, self._entries[index])
        values = []
        for position, leaf in enumerate(part.returned or ()):
            value = self._resolve(part.end, self._entries[part.end], leaf, position)
            values.append(self.fake_tensors.fake(value) if isinstance(value, torch.Tensor) else value)
        return part.piece.returned(values)

    # -- what entries are given ---------------------------------------------------------------------------------

    def _resolve(self, index: int, entry: Entry, leaf: Any, position: int) -> Any:
        """What stands for a leaf of an entry; a slot or an input that is met first becomes an input of the graph."""
        if type(leaf) is Slot or type(leaf) is Input:
            if leaf not in self.fakes:
                self._lift(index, leaf, position)
            return self.fakes[leaf]
        if position in entry.numbers:
            return self._number(FloatSource(index, position), leaf)
        return leaf

    def _lift(self, index: int, leaf: Slot | Input, position: int) -> None:
        if type(leaf) is Slot:
            assert leaf.value is not None
            shape, dtype, strides = tuple(leaf.meta.shape), leaf.meta.dtype, None
        else:
            assert type(leaf) is Input
            shape, dtype, strides = leaf.shape, leaf.dtype, leaf.strides
        self.fakes[leaf] = self.fake_tensors.fake_like(shape, dtype, strides)
        self.leaves.append((index, position, self._recorder.value_of(self.fakes[leaf])))

    def _seed(self, index: int) -> torch.Tensor:
        if index not in self._seed_fakes:  # a block that is computed again draws the same
            self._seed_fakes[index] = self.fake_tensors.fake_like((), torch.int64)
            self.seeds.append((index, self._recorder.value_of(self._seed_fakes[index])))
        return self._seed_fakes[index]

    def _number(self, source: FloatSource, value: float) -> TracedFloat:
        fake = self.fake_tensors.fake_like((), torch.float64)
        self.numbers.append((source, self._recorder.value_of(fake)))
        return TracedFloat(value, fake, source)

    def _hyperparameter(self, index: int, optimizer: weakref.ref, path: tuple, value: float) -> TracedFloat:
        return self._number(FloatSource(index, path, optimizer), value)

    def _piece_of(self, index: int, entry: Entry) -> "_Captured | None":
        if entry.piece is None:
            return None
        return self.pieces.setdefault(id(entry.piece), _Captured(index, self.run_part, self._order))


class _Captured(ReplayedPiece):
    """A piece of backward's Python in a graph of fake tensors."""

    def __init__(self, index: int, run: Callable[[Part, Any], Any], order: list[tuple[int, bytes | int]] | None):
        self._index, self._run, self._order = index, run, order
        self.parts: list[Part] = []

    def backward(self, gradients: Any) -> Any:
        if self._order is not None and not self.parts:
            there = bytes(position for position, gradient in enumerate(gradients) if gradient is not None)
            self._order.append((self._index, there))
            return NotImplemented
        return self._run(self.parts.pop(0), gradients) if self.parts else None


def backward_order(
    entries: list[Entry], flags: dict[int, tuple[torch.Tensor, bool]]
) -> tuple[tuple[int, bytes | int], ...]:
    """The order in which the last entry, a backward, runs the Python that entries have put into the graph.

    Args:
        entries: A tape.
        flags: See `capture`.

    Returns:
        For each piece of Python the index of its entry, and the positions of its results that get a gradient; for each
        checkpointed block the index of its first entry, and how many are computed again.
    """
    order: list[tuple[int, bytes | int]] = []
    capture(entries, flags=flags, order=order)
    return tuple(order)


def _runs_along(first: Entry, other: Entry) -> bool:
    """Whether two entries are replayed without leaving the modes in between."""
    return not other.optimizers and other.device == first.device


@contextlib.contextmanager
def _no_new_state(entries: list[Entry]) -> Iterator[None]:
    """Takes what a captured `step` has put into an optimizer's state away again, and fails if it has changed any.

    Raises:
        CaptureError: The optimizer counts in Python, or makes state.
    """
    stepped = [(optimizer, optimizers.HostState(optimizer)) for entry in entries for optimizer in entry.optimizers]
    try:
        yield
        for optimizer, state in stepped:
            if state.changed():
                raise optimizers.counts_in_python(optimizer)
            if optimizers.has_fake_state(optimizer):
                raise PassingCaptureError(reason=optimizers.NEW_STATE, where=entries[0].where)
    finally:
        for optimizer, state in stepped:
            optimizers.drop_fake_state(optimizer)
            state.restore()


def _state(fake_tensors: FakeTensors) -> tuple[list[LiftedTensor], list[tuple[weakref.ref, int | None]]]:
    recorder = fake_tensors.recorder
    owners = {
        id(gradient): weakref.ref(real)
        for real in fake_tensors.lifted
        if real.is_leaf and (gradient := real_gradient(real)) is not None
    }
    gradients: list[tuple[weakref.ref, int | None]] = []
    for real in fake_tensors.lifted:
        before = real_gradient(real) if real.is_leaf else None
        after = fake_tensors.gradient(real)
        if after is None:
            if before is not None:
                gradients.append((weakref.ref(real), None))
        elif before is None or after is not fake_tensors.fake(before):
            gradients.append((weakref.ref(real), recorder.value_of(after)))
    lifted = [
        LiftedTensor(
            weakref.ref(real),
            owners.get(id(real)),
            fake_tensors.first_value(real),
            recorder.value_of(fake_tensors.fake(real)),
        )
        for real in fake_tensors.lifted
    ]
    return lifted, gradients
