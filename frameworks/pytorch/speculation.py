"""Runs the backward that is about to be asked for together with the forward that has been looked at.

A loop that reads `loss.item()` before `loss.backward()` would otherwise run its forward twice: once for the value, once
in the step. The gradients are held until the loop asks for them; a wrong guess is discarded, never committed.
"""

from dataclasses import dataclass
from typing import Any

import torch

from trainingcompiler.errors import CaptureError
from trainingcompiler.frameworks.pytorch.calls import CallBook
from trainingcompiler.frameworks.pytorch.compiled_tape import Held, Purpose
from trainingcompiler.frameworks.pytorch.numbers import NumberUsed
from trainingcompiler.frameworks.pytorch.programs import ProgramCache
from trainingcompiler.frameworks.pytorch.replaying import undeferred
from trainingcompiler.frameworks.pytorch.tape import Entry, Input, Slot, Tape


class Speculation:
    """What followed each look at a tape, and what is held because it may follow again."""

    def __init__(self, programs: ProgramCache, calls: CallBook):
        self._programs = programs
        self._calls = calls
        self._followers: dict[tuple, Entry | None] = {}  # None: this look is not followed by one backward
        self._looked_at: tuple | None = None
        self._held: tuple[Entry, Held] | None = None

    def look(self, tape: Tape, slot: Slot) -> bool:
        """Computes the live values of a tape, and with them the gradients that will be asked for next.

        The first time, the guess is `loss.backward()` of the scalar looked at; after that, what has followed.

        Args:
            tape: Everything pending.
            slot: The value that the loop looks at.

        Returns:
            Whether the values have been computed.
        """
        self.forget()
        key, numbering = self._programs.signature(tape.entries)
        self._looked_at = key
        if key not in self._followers:
            if slot.meta.ndim or not slot.meta.requires_grad or slot.freed or not slot.live:
                return False
            guess = self._calls.entry(torch.Tensor.backward, (slot.wrapper(), None, None, False), {"inputs": None})
            self._followers[key] = _template(guess, numbering)
        follower = self._followers[key]
        if follower is None:
            return False
        slots = {number: slot for slot, number in numbering.items()}
        leaves = [slots[leaf.number] if isinstance(leaf, _Numbered) else leaf for leaf in follower.leaves]
        backward = Entry(follower.function, follower.structure, leaves, follower.ambient, follower.key)
        try:
            with undeferred():
                held = self._programs.run([*tape.entries, backward], tape.live_slots(), Purpose.HOLD)
        except (CaptureError, NumberUsed):
            self._followers[key] = None
            return False
        assert held is not None
        self._held = backward, held
        return True

    def backward(self, tape: Tape, entry: Entry) -> Held | None:
        """Takes note of a backward, the last entry of the tape.

        Returns:
            Its results, if it is the one that has been run already.
        """
        if self._looked_at is None:
            return None
        key, numbering = self._programs.signature(tape.entries[:-1])
        looked_at, self._looked_at = self._looked_at, None
        if self._held is None:
            if key == looked_at and not tape.mutated:
                self._followers.setdefault(key, _template(entry, numbering))
            return None
        (expected, held), self._held = self._held, None
        if key == looked_at and expected.key == entry.key and expected.leaves == entry.leaves:
            return held
        self._followers[looked_at] = None
        return None

    def forget(self) -> None:
        """Drops what is held."""
        self._looked_at = self._held = None


@dataclass(frozen=True, slots=True)
class _Numbered:
    """Stands for the slot with a number."""

    number: int


def _template(backward: Entry, numbering: dict[Slot, int]) -> Entry | None:
    leaves: list[Any] = [_Numbered(numbering[leaf]) if isinstance(leaf, Slot) else leaf for leaf in backward.leaves]
    if any(isinstance(leaf, Input) for leaf in leaves):
        return None
    return Entry(backward.function, backward.structure, leaves, backward.ambient, backward.key)
