"""The one who waits for a script's first training step, to plan it: adapters hand it over, and it is not run."""

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, Protocol

from trainingcompiler.errors import UsageError
from trainingcompiler.planning.batch_scaling import Recipe
from trainingcompiler.planning.first_step import FirstStep
from trainingcompiler.program import StepProgram
from trainingcompiler.targets.gpus import Gpu


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

    def eager_bytes(self, rows: int, batch_size: int) -> int | None:
        """What the framework itself needs for the step with another batch, an estimate; None if nobody can tell.

        Args:
            rows: As for `program_at`.
            batch_size: Likewise.
        """

    def variants(self) -> Mapping[str, "PlannableStep"]:
        """The same step in ways that may need less memory, by what the script has to do for it."""

    def recipe(self) -> dict[str, Any]:
        """Fields of `scaling.Recipe`, as far as the step tells: of the optimizer, at its peak."""


class Planner:
    """Waits for a script's first training step.

    Args:
        batch_size: Rows of the script's batch, where the person has named them.
        fills_weights: Whether the model's weights are to be filled; a step that is not taken needs no values.
        rehearses: Whether the script is to do what the launcher recommends, as in its run, to see whether it does.
        gpu: A described one that the plan is for, which the script is to find.

    Attributes:
        fills_weights: Likewise.
        rehearses: Likewise.
        gpu: Likewise.
        first_step: What the step would have trained with; None where an adapter does not tell.
        applies: Who can give the script another batch: `"arguments"`, the script's own options; `"script"`, which asks
            with `trainingcompiler.recommendation()`; or the library whose arguments can be set, `"huggingface"` or
            `"keras"`.
        backwards: How often each line of the script has called `backward()` so far.
        surroundings: What an adapter needs around the script only; closed when the script has been stopped.
    """

    class Enough(BaseException):
        """Stops the script at its first step; no `except Exception` of the script's catches it."""

    def __init__(
        self,
        batch_size: int | None = None,
        fills_weights: bool = False,
        *,
        rehearses: bool = False,
        gpu: Gpu | None = None,
    ):
        self._named = batch_size
        self.fills_weights = fills_weights
        self.rehearses = rehearses
        self.gpu = gpu
        self.first_step: FirstStep | None = None
        self._step: PlannableStep | None = None
        self._refusal: str | None = None
        self._rows = 0
        self._told: dict[str, Any] = {}
        self.applies = "arguments"
        self.backwards: Counter[str | None] = Counter()
        self.surroundings = contextlib.ExitStack()

    def tell(self, applies: str, **recipe: Any) -> None:
        """Takes what a library knows of the run, fields of `scaling.Recipe`; and that its arguments can be set.

        A script that has asked is taken to follow, whatever library it uses: nothing is changed twice.
        """
        if self.applies != "script":
            self.applies = applies
        self._told |= recipe

    def take(self, step: PlannableStep) -> NoReturn:
        """Takes the script's step, and stops the script."""
        self._step = step
        raise self.Enough

    def left(self, reason: str) -> NoReturn:
        """Takes the word that the framework would run the step itself, and stops the script.

        A rehearsed step need not be a program: a first one that PyTorch has to run is one as well.
        """
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

    def rehearsed(self) -> tuple[int, int, FirstStep]:
        """The rows and the number of the batches that a rehearsed step adds up, and what it trains with.

        Raises:
            UsageError: As for `rows`; or nothing tells.
        """
        seen = self.first_step
        if seen is not None and self._refusal is not None and seen.calls:
            return seen.calls[0], self._told.get("accumulation_steps", len(seen.calls)), seen
        rows, recipe = self.rows(), self.recipe()
        if recipe is None or seen is None:
            raise UsageError("the script's optimizer does not tell its learning rate")
        return rows, recipe.accumulation_steps, seen

    def program_at(self, batch_size: int) -> StepProgram:
        """The step with another batch; `rows` has been asked before."""
        assert self._step is not None and self._rows
        return self._step.program_at(self._rows, batch_size)

    def eager_bytes(self, batch_size: int) -> int | None:
        """What the framework itself needs for that; likewise."""
        assert self._step is not None and self._rows
        return self._step.eager_bytes(self._rows, batch_size)

    @property
    def step(self) -> PlannableStep:
        """What was taken; `rows` has been asked before."""
        assert self._step is not None and self._rows
        return self._step

    def recipe(self) -> Recipe | None:
        """What of the run depends on its batch size; None where the optimizer does not tell. Likewise."""
        assert self._step is not None and self._rows
        accumulated = max(self.backwards.values(), default=1)
        groups = self.first_step.groups if self.first_step is not None else ()
        rates = [{"lr": group.peak} for group in groups if group.peak][:1]
        known: dict[str, Any] = {"accumulation_steps": accumulated, **self._step.recipe()}
        for more in (*rates, self._told, {"batch_size": self._rows}):
            known |= more
        return Recipe(**known) if known.get("lr") else None


current: Planner | None = None
"""While there is one, adapters compile whatever they can, hand the first training step to it, and run none."""
