"""Runs the backward that is about to be asked for together with the forward that has been looked at.

A loop that reads `loss.item()` before `loss.backward()` would otherwise run its forward twice: once for the value, once
in the step. The gradients are held until the loop asks for them; a wrong guess is discarded, never committed.
"""

from typing import Any

from trainingcompiler.errors import CaptureError
from trainingcompiler.frameworks.pytorch.capture.traced_float import ConcretizationError
from trainingcompiler.frameworks.pytorch.interop.gradients import BACKWARD
from trainingcompiler.frameworks.pytorch.interop.passthrough import passthrough
from trainingcompiler.frameworks.pytorch.interop.pytree import flatten
from trainingcompiler.frameworks.pytorch.interop.torch_modes import TorchModes
from trainingcompiler.frameworks.pytorch.runtime.compile_policy import NotWorthCompilingError
from trainingcompiler.frameworks.pytorch.runtime.compiled_step import Held
from trainingcompiler.frameworks.pytorch.runtime.program_cache import ProgramCache
from trainingcompiler.frameworks.pytorch.runtime.step_plan import Purpose
from trainingcompiler.frameworks.pytorch.tape.call_key import CallKey, constant_key
from trainingcompiler.frameworks.pytorch.tape.entries import Entry, Slot
from trainingcompiler.frameworks.pytorch.tape.recording import Call, Recording
from trainingcompiler.frameworks.pytorch.tape.tape import Tape


class Speculation:
    """What followed each look at a tape, and what is held because it may follow again."""

    def __init__(self, programs: ProgramCache, recording: Recording):
        self._programs = programs
        self._recording = recording
        self._looked_at: Call | None = None
        self._held: tuple[Call, Held] | None = None

    def look(self, tape: Tape, slot: Slot) -> bool:
        """Computes the live values of a tape, and with them the gradients that will be asked for next.

        The guess is `loss.backward()` of the scalar looked at, unless that has been wrong here.

        Args:
            tape: Everything pending.
            slot: The value that the loop looks at.

        Returns:
            Whether the values have been computed.
        """
        self.forget()
        self._looked_at = tape.place
        if tape.place.backward_follows is False or tape.has_pieces:  # whose Python runs when backward is asked for
            return False
        if slot.meta.ndim or not slot.requires_grad or slot.freed or not slot.live:
            return False
        backward = self._backward(tape, slot)
        try:
            with passthrough():
                held = self._programs.run([*tape.entries, backward], tape.live_slots(), Purpose.HOLD, tape.grad_flags)
        except NotWorthCompilingError:
            return False
        except (CaptureError, ConcretizationError):
            tape.place.backward_follows = False
            return False
        assert held is not None and backward.call is not None
        self._held = backward.call, held
        return True

    def _backward(self, tape: Tape, slot: Slot) -> Entry:
        arguments: Any = (slot, None, None, False), {"inputs": None}
        leaves, structure = flatten(arguments)
        keys = tuple(slot.key if leaf is slot else constant_key(leaf) for leaf in leaves)
        last = tape.place.last
        modes = TorchModes.now()._replace(grad=True)
        call = self._recording.follow(tape.place, CallKey(BACKWARD, structure, keys, modes, tape.region), leaves)
        if last is not None:
            tape.place.last = last
        return Entry(BACKWARD, structure, leaves, modes, call, where=call.where)

    def backward(self, tape: Tape, entry: Entry) -> Held | None:
        """Takes note of a backward, the last entry of the tape.

        Returns:
            Its results, if it is the one that has been run already.
        """
        looked_at, self._looked_at = self._looked_at, None
        held, self._held = self._held, None
        if held is None or looked_at is None:
            return None
        if held[0] is entry.call:
            return held[1]
        looked_at.backward_follows = False
        return None

    def forget(self) -> None:
        """Drops what is held."""
        if self._held is not None and self._looked_at is not None:
            self._looked_at.wrong_guesses += 1
            if self._looked_at.wrong_guesses > 1:
                self._looked_at.backward_follows = False
        self._looked_at = self._held = None
