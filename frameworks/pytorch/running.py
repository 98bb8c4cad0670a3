"""Runs the tape: as programs, for good or for a look, and in torch where no program can be made of it."""

from typing import Any, NoReturn

import torch
from torch import nn

from trainingcompiler import planner
from trainingcompiler.config import TrainingCompilerConfig
from trainingcompiler.cures import with_cures
from trainingcompiler.errors import CaptureError, FallbackError, NotEnoughMemoryError, PassingCaptureError
from trainingcompiler.frameworks.pytorch.calls import CallBook, detached
from trainingcompiler.frameworks.pytorch.compiled_tape import Purpose
from trainingcompiler.frameworks.pytorch.fallback import Fallbacks
from trainingcompiler.frameworks.pytorch.guard import StateGuard, versions
from trainingcompiler.frameworks.pytorch.loops import OptimizerBook
from trainingcompiler.frameworks.pytorch.numbers import NumberUsed
from trainingcompiler.frameworks.pytorch.optimizers import parameters_of
from trainingcompiler.frameworks.pytorch.planned import RecordedStep, pretend
from trainingcompiler.frameworks.pytorch.programs import ProgramCache
from trainingcompiler.frameworks.pytorch.recorder import user_line
from trainingcompiler.frameworks.pytorch.replaying import undeferred
from trainingcompiler.frameworks.pytorch.speculation import Speculation
from trainingcompiler.frameworks.pytorch.tape import Entry, Slot, Tape, run_in_torch
from trainingcompiler.frameworks.pytorch.workers import Workers
from trainingcompiler.targets import Target


class TapeRunner:
    """The tape, and what becomes of its entries.

    Attributes:
        deferring: Whether calls are recorded at this moment; the engine turns it on and off between steps.
        tape: What has been recorded and not been committed.
        programs: What has been compiled.
        calls: What is known of modules and functions.
        book: What is known of optimizers.
        fallbacks: What is left to torch.
        workers: Of a script of several processes.
        backward_compiled: Whether the last backward ran as a program.
    """

    def __init__(self, config: TrainingCompilerConfig):
        self.deferring = False
        self.tape = Tape()
        self.calls = CallBook()
        self.book = OptimizerBook(config.keep_gradients)
        self.programs = ProgramCache(self.book, Target.of(config))
        self.fallbacks = Fallbacks(config)
        self.workers: Workers | None = None
        self.backward_compiled = False
        self._guard = StateGuard(self._before_write, self.commit)
        self._called_since_backward: set[int] = set()
        self._speculation = Speculation(self.programs, self.calls)

    def commit(self) -> None:
        """Runs the entries that no live value needs a gradient through, for good."""
        count = self.tape.committable()
        if count == 0:
            return
        entries, rest = self.tape.entries[:count], self.tape.entries[count:]
        live = [slot for entry in entries for slot in entry.outputs if slot.live]
        needed = {slot for entry in rest for slot in entry.slots()}
        exports = [slot for entry in entries for slot in entry.outputs if slot in needed or slot in set(live)]
        self._guard.rest()
        self._check_parameters(entries)
        self._check_gradients(entries)
        if planner.current is not None and self._planned(entries, planner.current):
            return self._committed(entries, rest)
        try:
            with undeferred():
                self.programs.run(entries, exports, Purpose.COMMIT)
        except (CaptureError, NotEnoughMemoryError, NumberUsed) as error:
            return self.commit() if self._tries_again(error, entries) else None
        self._committed(entries, rest)
        return None

    def value(self, slot: Slot) -> torch.Tensor:
        """The real tensor of a slot, computed now if it has not been."""
        if slot.value is not None:
            return slot.value
        producers = self.tape.producers()
        if slot not in producers:
            raise AssertionError("a deferred tensor lost its tape")
        apart = self.workers is not None and self.workers.may_be_looked_at(self.tape, slot)
        if producers[slot] < self.tape.committable() and not apart:
            self.commit()
        else:
            self._peek(slot, apart)
        assert slot.value is not None
        return slot.value

    def run_eagerly(self, error: CaptureError, culprit: nn.Module | torch.optim.Optimizer | None = None) -> None:
        """Runs the tape in torch, with its gradient history, and leaves what is on it to torch from now on.

        Args:
            error: Why. A `PassingCaptureError` is a reason for one step only.
            culprit: A module or optimizer, not on the tape, that is left to torch too.

        Raises:
            FallbackError: The user wants no fallback.
        """
        items = [item for entry in self.tape.entries for item in (entry.function, *entry.optimizers)]
        if error.culprit is not None:
            items = [error.culprit]
        items = [item for item in (*items, culprit) if isinstance(item, nn.Module | torch.optim.Optimizer)]
        try:
            self.fallbacks.leave(error, items)
        except FallbackError:
            self.tape.entries.clear()
            raise
        self._check_gradients(self.tape.entries)
        self._guard.rest()
        entries, self.tape = self.tape.entries, Tape()
        self._called_since_backward = set()
        self.backward_compiled = False
        self._speculation.forget()
        with undeferred():
            for entry in entries:
                run_in_torch(entry)

    def finish(self) -> None:
        """Computes everything that has been asked for, gradients of a step that was aborted half-way included."""
        self._guard.rest()
        self.commit()
        for slot in self.tape.live_slots():
            self.value(slot)
        self.programs.pace.settle()
        if self.programs.division is not None:
            self.programs.division.end()
        self.deferring = False

    @property
    def has_backward(self) -> bool:
        """Whether a backward is on the tape, so that only the tape knows the gradients."""
        return bool(self._called_since_backward)

    def _peek(self, slot: Slot, apart: bool = False) -> None:
        """Computes values without ending the tape: nothing is committed, the entries will be replayed.

        Args:
            slot: The value that is looked at.
            apart: Whether to compute no other one.
        """
        # A worker that looks must not average gradients which the others do not come to average.
        if self.workers is None and self._speculation.look(self.tape, slot):
            return None
        slots = [] if apart else [other for other in self.tape.live_slots() if other.value is None]
        if slot not in slots:
            slots.append(slot)
        entries = self.tape.slice_for(slots)
        try:
            with undeferred():
                self.programs.run(entries, slots, Purpose.PEEK)
        except (CaptureError, NotEnoughMemoryError, NumberUsed) as error:
            return self._peek(slot, apart) if self._tries_again(error, entries) else None
        return None

    def _planned(self, entries: list[Entry], waiting: planner.Planner) -> bool:
        """Hands a step over to who plans it, and passes over a batch that only adds to gradients."""
        backwards = [entry.where for entry in entries if entry.function is torch.Tensor.backward]
        waiting.backwards.update(backwards)
        if any(entry.optimizers for entry in entries):
            waiting.take(RecordedStep(self.programs, entries))
        if backwards:
            with undeferred():
                pretend(entries)
        return bool(backwards)

    def _before_write(self) -> None:
        """Computes what has read the state that is about to be written to."""
        if self.tape.committable() == len(self.tape.entries):
            self.commit()
        else:
            reason = "the model's state is changed between a call and its backward()"
            self.run_eagerly(PassingCaptureError(reason=reason, where=user_line()))

    def _committed(self, entries: list[Entry], rest: list[Entry]) -> None:
        self.backward_compiled |= self.has_backward
        for entry in entries:
            for slot in entry.outputs or ():
                slot.committed = True
        self._guard.rest()
        for entry in rest:
            detached(entry)
            self._guard_state(entry)
        self.tape.entries = rest
        self.tape.mutated = False
        self._called_since_backward = set()
        self._speculation.forget()

    def _check_parameters(self, entries: list[Entry]) -> None:
        for entry in entries:
            if entry.versions and entry.versions != versions(entry.prints[0].parameters):
                self.tape.entries.clear()
                raise RuntimeError(
                    f"A parameter of {type(entry.function).__name__} was modified in place after the call at "
                    f"{entry.where} and before its backward(), which needs the value that the call saw. Modify it "
                    "before the call, or after optimizer.step()."
                )

    def _check_gradients(self, entries: list[Entry]) -> None:
        for entry in entries:
            for optimizer in entry.optimizers:
                self.book.check_unconsumed(parameters_of(optimizer))

    def _tries_again(self, error: Exception, entries: list[Entry]) -> bool:
        """Answers why entries are no program: true if they may be one now, and else torch has run the tape.

        Raises:
            NotEnoughMemoryError: `error` is one; what would need less is said with it.
            FallbackError: The user wants no fallback.
        """
        if isinstance(error, NotEnoughMemoryError):
            self._give_up(error, entries)
        if isinstance(error, NumberUsed) and self._make_constant(entries, error):
            return True
        self.run_eagerly(error if isinstance(error, CaptureError) else _unusable(error))
        return False

    def _give_up(self, error: NotEnoughMemoryError, entries: list[Entry]) -> NoReturn:
        self.tape.entries.clear()
        with undeferred():
            raise with_cures(error, RecordedStep(self.programs, entries), self.programs.target) from None

    def _make_constant(self, entries: list[Entry], error: NumberUsed) -> bool:
        source: Any = error.source
        if source is None:
            return False
        if source.optimizer is not None:
            return self.book.fix_number(source.optimizer(), source.position)
        self.calls.fix_number(entries[source.entry], source)
        return True

    def _guard_state(self, entry: Entry) -> None:
        for fingerprint in entry.prints:
            self._guard.watch(fingerprint.tensors)


def _unusable(error: Exception) -> CaptureError:
    unusable = CaptureError("the step decides by the value of a number that is computed in it", user_line())
    unusable.__cause__ = error  # shown by --debug
    return unusable
