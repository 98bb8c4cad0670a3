"""The PyTorch half of `trainingcompiler.plan`: a script's first training step, as a program for any batch size."""

import contextlib
import dataclasses
import os
import sys
from typing import Any

from trainingcompiler.errors import CaptureError, UsageError
from trainingcompiler.frameworks.pytorch import inspection
from trainingcompiler.frameworks.pytorch.capture import CapturedStep, capture
from trainingcompiler.frameworks.pytorch.described import with_state
from trainingcompiler.frameworks.pytorch.numbers import NumberUsed
from trainingcompiler.frameworks.pytorch.programs import CompiledTape, ProgramCache, Purpose, leaf_name
from trainingcompiler.frameworks.pytorch.replaying import undeferred
from trainingcompiler.frameworks.pytorch.tape import Entry, Input
from trainingcompiler.program import StepProgram


class PlanRun:
    """Watches a script until its first training step, which is not run.

    Args:
        batch_size: Rows of the script's batch, where the person has named them.
    """

    class Enough(BaseException):
        """Stops the script at its first step; no `except Exception` of the script's catches it."""

    def __init__(self, batch_size: int | None = None):
        self._named = batch_size
        self._cache: ProgramCache | None = None
        self._entries: list[Entry] = []
        self._refusal: str | None = None

    def start(self) -> None:
        """Begins to watch."""
        inspection.planner = self

    def step(self, cache: ProgramCache, entries: list[Entry]) -> None:
        """Takes the recorded step; see `inspection.Planner`."""
        self._cache, self._entries = cache, list(entries)
        raise self.Enough

    def torch_steps(self, reason: str) -> None:
        """Takes the word that there is no recorded step; see `inspection.Planner`."""
        self._refusal = reason
        raise self.Enough

    def seen(self) -> int:
        """Ends watching; returns the rows of the script's own batch.

        Raises:
            UsageError: No step was reached, it cannot be captured, or its batch dim cannot be found.
        """
        inspection.planner = None
        script = os.path.basename(sys.argv[0])
        if self._refusal is not None:
            raise UsageError(
                f"the step of {script} would run in torch, so there is no program to plan: {self._refusal}"
            )
        if self._cache is None:
            raise UsageError(f"{script} reached no optimizer.step(), so there is nothing to plan")
        given = [(leaf_name(entry, place), leaf.shape) for entry, place, leaf in _inputs(self._entries) if leaf.shape]
        if not given:
            raise UsageError(f"the step of {script} is given no tensor, so it has no batch")
        rows = self._named or given[0][1][0]
        fixed = [f"{name} {list(shape)}" for name, shape in given if shape[0] != rows]
        if self._named is None and fixed:
            raise UsageError(
                f"the tensors that the step is given disagree about the batch: {given[0][0]} {list(given[0][1])} and "
                f"{', '.join(fixed[:3])}. Name the script's batch size, --script-batch-size N: what has N rows is "
                "scaled, the others stay"
            )
        if len(fixed) == len(given):
            raise UsageError(
                f"--script-batch-size={rows}: no tensor that the step is given has {rows} rows; it is given "
                f"{', '.join(fixed[:3])}"
            )
        self._rows = rows
        return rows

    def program_at(self, batch_size: int) -> StepProgram:
        """Captures the step again, with another number of rows in its batch.

        Raises:
            UsageError: The loop has numbers in it that were computed from the batch size.
            CaptureError: The step cannot be compiled, whatever its batch.
        """
        assert self._cache is not None
        entries = self._with_rows(batch_size)
        optimizers = {id(o): o for entry in entries for o in entry.optimizers}.values()
        for optimizer in optimizers:  # gradients die with the step, as in a loop that clears them
            self._cache.book.habits(optimizer).clears |= not self._cache.book.habits(optimizer).zeroes
        with undeferred(), contextlib.ExitStack() as stack:
            for optimizer in optimizers:
                stack.enter_context(with_state(optimizer))
            captured = self._captured(entries, batch_size)
            exports = [slot for entry in entries for slot in entry.outputs or () if slot.live]
            program = CompiledTape(self._cache, "train_step", entries, captured, exports, Purpose.COMMIT).program
        if program is None or not program.state:
            raise UsageError("the step changes nothing: does the optimizer train parameters that the loss depends on?")
        return dataclasses.replace(program, name=f"train_step_batch_{batch_size}")

    def _captured(self, entries: list[Entry], batch_size: int) -> CapturedStep:
        assert self._cache is not None
        book = self._cache.book
        while True:
            try:
                return capture(entries, lambda optimizer: book.habits(optimizer).constants)
            except NumberUsed as error:  # a hyperparameter that has to be a constant, as a run finds out too
                source: Any = error.source
                if (
                    source is None
                    or source.optimizer is None
                    or not book.fix_number(source.optimizer(), source.position)
                ):
                    raise CaptureError("the step decides by the value of a number", entries[0].where) from None
            except CaptureError:
                raise
            except Exception as error:
                reason = f"{type(error).__name__}: {error}".split("\n")[0]
                if batch_size == self._rows:
                    raise CaptureError(reason, entries[0].where) from error
                raise UsageError(
                    f"the step cannot be captured with a batch of {batch_size} in place of {self._rows}: something in "
                    f"the loop was computed from the batch size ({reason}). Name the script's option for it, "
                    "--batch-size-arg=--bs, and the script is run again for every size"
                ) from None

    def _with_rows(self, batch_size: int) -> list[Entry]:
        scaled: dict[int, Input] = {}

        def of(leaf: Any) -> Any:
            if not isinstance(leaf, Input) or not leaf.shape or leaf.shape[0] != self._rows:
                return leaf
            if id(leaf) not in scaled:
                scaled[id(leaf)] = dataclasses.replace(leaf, array=None, shape=(batch_size, *leaf.shape[1:]))
            return scaled[id(leaf)]

        return [dataclasses.replace(entry, leaves=[of(leaf) for leaf in entry.leaves]) for entry in self._entries]


def _inputs(entries: list[Entry]) -> list[tuple[Entry, int, Input]]:
    return [
        (entry, place, leaf) for entry in entries for place, leaf in enumerate(entry.leaves) if isinstance(leaf, Input)
    ]
