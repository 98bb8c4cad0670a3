"""Values that are looked at while the tape goes on: computed, and nothing committed."""

from typing import TYPE_CHECKING

import torch

from trainingcompiler.errors import CaptureError, NotEnoughMemoryError
from trainingcompiler.frameworks.pytorch.capture.traced_float import ConcretizationError
from trainingcompiler.frameworks.pytorch.interop.passthrough import outside_transforms, passthrough
from trainingcompiler.frameworks.pytorch.interop.source_lines import user_line
from trainingcompiler.frameworks.pytorch.runtime.step_plan import Purpose
from trainingcompiler.frameworks.pytorch.runtime.torch_peek import value_of
from trainingcompiler.frameworks.pytorch.session.backward_pieces import LeftToTorch
from trainingcompiler.frameworks.pytorch.session.speculation import Speculation
from trainingcompiler.frameworks.pytorch.session.tape_in_torch import run_in_torch
from trainingcompiler.frameworks.pytorch.tape.entries import Entry, Slot

if TYPE_CHECKING:
    from trainingcompiler.frameworks.pytorch.session.tape_runner import TapeRunner

_MANY_ROOTS = 4  # calls of modules before a backward
_FEW_CALLS = 64  # as many are computed by torch for a look at a value; more are worth a program


class Peeks:
    """How a value on the tape is computed before its time.

    A few calls are torch's to run. More are a program: of all that is pending and, where a backward has followed such a
    look before, of that backward too.

    Attributes:
        speculation: What is computed together with a value because it may be asked for next.
    """

    def __init__(self, runner: "TapeRunner"):
        self._runner = runner
        self.speculation = Speculation(runner.programs, runner.recording)

    def value(self, slot: Slot) -> torch.Tensor:
        """The value of a pending slot, which has none yet. What can be committed is.

        Raises:
            LeftToTorch: Python that backward runs asks, and only torch can answer.
        """
        runner = self._runner
        if runner.tape.is_in_backward:
            return self._in_backward(slot)
        producer = runner.tape.producer(slot)
        if producer is None:
            raise AssertionError("a deferred tensor lost its tape")
        if runner.tape.second_run is not None and runner.tape.entries[producer].second is not None:
            raise LeftToTorch("a checkpointed block that computes something else when it runs again asks for a value")
        alone = runner.workers is not None and runner.workers.may_be_looked_at(runner.tape, slot)
        # In a forward, or in a loop that calls its model again and again, as an agent does: each look is another path.
        if (runner.depth or len(runner.tape.roots) > _MANY_ROOTS) and self._few(slot):
            assert slot.value is not None
            return slot.value
        if len(runner.tape.roots) > 1 and not runner.has_backward and not runner.depth:
            self.forget_unread(slot)
            producer = slot.producer
        if producer < runner.tape.committable() and not alone:
            runner.commit()
        else:
            self._peek(slot, alone)
        assert slot.value is not None
        return slot.value

    def _in_backward(self, slot: Slot) -> torch.Tensor:
        """A value that Python in backward asks for: torch computes it from the tape up to there.

        When all of that Python has run, once, torch runs the step, and those that follow.

        Raises:
            LeftToTorch: It cannot be computed now: torch has to run that Python again.
        """
        runner = self._runner
        what = "Python that backward() runs asks for a value"
        if not runner.programs.target.is_one_cpu or runner.workers is not None:
            raise LeftToTorch(what)
        try:
            with passthrough(), outside_transforms():
                constants = lambda optimizer: runner.registry.habits(optimizer).constants  # noqa: E731
                slot.value = value_of(list(runner.tape.entries), slot, constants, runner.tape.grad_flags)
        except (CaptureError, ConcretizationError):
            raise LeftToTorch(what) from None
        runner.tape.asked = runner.tape.asked or CaptureError(what, user_line())
        return slot.value

    def _peek(self, slot: Slot, alone: bool) -> None:
        """Computes values without ending the tape: nothing is committed, the entries will be replayed.

        Args:
            slot: The value that is looked at.
            alone: Whether to compute no other one.
        """
        runner = self._runner
        inside = runner.depth > 0
        if not inside and runner.is_undecided():
            return runner.begin_in_torch()
        entries = runner.tape.slice_for([slot])
        if self.is_a_look(entries) and self.in_torch(entries):
            return None
        # A worker that looks must not average gradients which the others do not come to average.
        if runner.workers is None and not inside and self.speculation.look(runner.tape, slot):
            return None
        # On a CPU torch has the state at hand: a metric of a small forward is not worth a program that computes it too.
        if runner.programs.target.is_one_cpu and len(entries) <= _FEW_CALLS and self.in_torch(entries):
            return None
        slots = [] if alone or inside else [other for other in runner.tape.live_slots() if other.value is None]
        if slot not in slots:
            slots.append(slot)
        entries = runner.tape.slice_for(slots)
        try:
            with passthrough():
                runner.programs.run(entries, slots, Purpose.PEEK, runner.tape.grad_flags)
        except (CaptureError, NotEnoughMemoryError, ConcretizationError) as error:
            return self._peek(slot, alone) if runner.tries_again(error, entries) else None
        return None

    def forget_unread(self, slot: Slot) -> None:
        """Takes calls off the tape whose results nobody holds any more: forwards of batches that were skipped."""
        tape = self._runner.tape
        if any(entry.writes_state or entry.optimizers or entry.acts_on_graph for entry in tape.entries):
            return
        if tape.blocks:  # a block that runs again is compared with all of its first run
            return
        needed = tape.behind([slot, *tape.live_slots()])
        if len(needed) < len(tape.entries):
            read, stays = tape.read, [tape.entries[index] for index in sorted(needed)]
            self._runner.rebuild(stays)
            leaves = {id(leaf) for entry in stays for leaf in entry.leaves}
            self._runner.tape.read = [one for one in read if id(one[2]) in leaves]

    def _few(self, slot: Slot) -> bool:
        """Has torch compute a value that a forward asks for, if few calls are behind it; returns whether it has."""
        entries = self._runner.tape.slice_for([slot])
        return len(entries) <= _FEW_CALLS and self.in_torch(entries)

    def is_a_look(self, entries: list[Entry]) -> bool:
        """Whether entries only look at state: `sum(p.norm() for p in model.parameters())` in a line of a log."""
        if len(entries) > _FEW_CALLS or self._runner.tape.roots:
            return False
        return not any(entry.seed is not None or entry.writes_state for entry in entries)

    def in_torch(self, entries: list[Entry]) -> bool:
        """Has torch compute a value from the few calls behind it, which stay pending; returns whether it could."""
        if any(entry.seed is not None or entry.writes_state for entry in entries):
            return False
        with passthrough(), torch.no_grad():
            run_in_torch(entries)
        for entry in entries:
            for slot in entry.outputs:
                slot.committed = False
        return True
