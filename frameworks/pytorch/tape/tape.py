"""The tape: what the loop has asked for and nobody has computed yet."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from trainingcompiler.errors import CaptureError
from trainingcompiler.frameworks.pytorch.interop.gradients import BACKWARD, stored_gradient
from trainingcompiler.frameworks.pytorch.tape.entries import Entry, Input, Slot, live_among, memory_of

if TYPE_CHECKING:
    from trainingcompiler.frameworks.pytorch.tape.recording import Call


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
        input_count: How many snapshots have been taken, which numbers them.
        read: Real tensors that calls with gradients have read, with their version then, and the snapshots.
        has_pieces: Whether the tape has Python that backward runs.
        is_in_backward: Whether that is being recorded.
        piece: The entry of the Python in backward that is running.
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
        self.piece: Entry | None = None
        self.asked: CaptureError | None = None
        self.slot_count = self.input_count = 0

    def __bool__(self) -> bool:
        return bool(self.entries)

    def __str__(self) -> str:
        return "\n".join(map(str, self.entries))

    def producer(self, slot: Slot) -> int | None:
        """The index of the entry that produces a slot; None if it is no slot of this tape."""
        index = slot.producer
        return index if 0 <= index < len(self.entries) and slot in self.entries[index].outputs else None

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
        known = [index for slot in slots if (index := self.producer(slot)) is not None]
        if any(self.entries[index].is_in_backward for index in known):
            return list(self.entries)
        if self.mutated:
            if any(entry.optimizers for entry in self.entries):
                return list(self.entries)
            return [self.entries[index] for index in sorted(self._behind_with_writes(slots))]
        indices = self._ancestors(slots, lambda read: read.value is None)
        last = max((index for index in indices if self.entries[index].reads_gradients), default=-1)
        indices |= set(range(last))
        return [self.entries[index] for index in sorted(indices)]

    def _behind_with_writes(self, slots: list[Slot]) -> set[int]:
        """The indices of entries behind `slots`, those that write to memory which one of these reads included."""
        writers: dict[int, list[int]] = {}  # by the identity of what has the memory
        for index, entry in enumerate(self.entries):
            for position in entry.writes:
                writers.setdefault(id(memory_of(entry.leaves[position])), []).append(index)
        found: set[int] = set()
        pending: list[int] = []

        def need(slot: Slot) -> None:
            producer = self.producer(slot)
            if producer is not None:
                pending.extend((producer, *writers.get(id(memory_of(slot)), ())))

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
        return found

    def entries_behind(self, slot: Slot) -> list[Entry]:
        """What the gradient of a slot passes through."""
        return [self.entries[index] for index in self._gradient_path([slot])]

    def behind(self, slots: list[Slot]) -> set[int]:
        """The indices of all entries that slots depend on."""
        return self._behind_with_writes(slots) if self.mutated else self._ancestors(slots, lambda read: True)

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
        found: set[int] = set()
        pending = [self.producer(slot) for slot in slots]
        while pending:
            index = pending.pop()
            if index is not None and index not in found:
                found.add(index)
                leaves = self.entries[index].leaves
                pending += [self.producer(leaf) for leaf in leaves if type(leaf) is Slot and follows(leaf)]
        return found
