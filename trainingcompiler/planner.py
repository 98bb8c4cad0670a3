"""The one who waits for a script's first training step, to plan it: adapters hand it over, and it is not run."""

import os
import sys
from collections.abc import Sequence
from typing import NoReturn, Protocol

from trainingcompiler.errors import UsageError
from trainingcompiler.program import StepProgram


class PlannableStep(Protocol):
    """A training step that was called and not run."""

    def given(self) -> Sequence[tuple[str, tuple[int, ...]]]:
        """The name and shape of every tensor that the step is given."""

    def program_at(self, rows: int, batch_size: int) -> StepProgram:
        """Captures the step with another batch.

        Args:
            rows: The script's own; a tensor whose first dim is that long belongs to the batch.
            batch_size: How long the dim is to be.

        Raises:
            UsageError: The step depends on its own batch size.
            CaptureError: It cannot be compiled, whatever its batch.
        """


class Planner:
    """Waits for a script's first training step.

    Args:
        batch_size: Rows of the script's batch, where the person has named them.
    """

    class Enough(BaseException):
        """Stops the script at its first step; no `except Exception` of the script's catches it."""

    def __init__(self, batch_size: int | None = None):
        self._named = batch_size
        self._step: PlannableStep | None = None
        self._refusal: str | None = None
        self._rows = 0

    def take(self, step: PlannableStep) -> NoReturn:
        """Takes the script's step, and stops the script."""
        self._step = step
        raise self.Enough

    def left(self, reason: str) -> NoReturn:
        """Takes the word that the framework would run the step itself, and stops the script."""
        self._refusal = reason
        raise self.Enough

    def rows(self) -> int:
        """The rows of the script's own batch.

        Raises:
            UsageError: No step was reached, it is not compiled, or its batch dim cannot be found.
        """
        script = os.path.basename(sys.argv[0])
        if self._refusal is not None:
            raise UsageError(f"the step of {script} is no program that could be planned: {self._refusal}")
        if self._step is None:
            raise UsageError(
                f"{script} reached no optimizer.step() of PyTorch and no training step of Keras, so there is nothing "
                "to plan"
            )
        given = [(name, shape) for name, shape in self._step.given() if shape]
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
        """The step with another batch; `rows` has been asked before."""
        assert self._step is not None and self._rows
        return self._step.program_at(self._rows, batch_size)


current: Planner | None = None
"""While there is one, adapters compile whatever they can, hand the first training step to it, and run none."""
