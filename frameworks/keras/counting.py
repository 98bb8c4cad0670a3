"""Counts the training steps of models that Keras trains by itself, so that a run of them is not taken for nothing."""

import functools
import time
from collections.abc import Callable
from typing import Any

from trainingcompiler.reporting.statistics import current as statistics

_MAKE = "make_train_function"


class Counted:
    """A train function of Keras, and a count of its steps."""

    def __init__(self, function: Callable, steps: int, engine: str):
        self._function, self._steps, self._engine = function, steps, engine

    def __call__(self, iterator: Any) -> Any:
        """Runs one execution, of so many steps."""
        result = self._function(iterator)
        for _ in range(self._steps):
            statistics().step_finished(self._engine, time.monotonic())
        return result


def count_steps(model: Any, engine: str) -> None:
    """Counts the steps of `model` as those of `engine`, "eager" or "tensorflow"."""
    make = functools.partial(type(model).make_train_function, model)

    @functools.wraps(type(model).make_train_function)
    def make_train_function(force: bool = False) -> Any:
        result = make(force)
        function = model.train_function
        if function is not None and not isinstance(function, Counted):
            model.train_function = Counted(function, getattr(model, "steps_per_execution", 1), engine)
        return result

    vars(model)[_MAKE] = make_train_function  # past Keras's tracking of attributes


def stop_counting(model: Any) -> None:
    """Leaves the model as it was."""
    vars(model).pop(_MAKE, None)
