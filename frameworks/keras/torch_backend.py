"""Keras on PyTorch is not compiled: its optimizers are Keras's own, written in Python, and not `torch.optim`'s.

The script trains as Keras trains it, and one line says so and what to do; the steps are counted.
"""

import time
import weakref
from collections.abc import Callable
from typing import Any

from keras.src.backend.torch.trainer import TorchTrainer

from trainingcompiler import fallback
from trainingcompiler.config import TrainingCompilerConfig
from trainingcompiler.errors import CaptureError
from trainingcompiler.statistics import current as statistics

REASON = (
    "Keras on PyTorch steps with optimizers of its own, which are not captured. KERAS_BACKEND=tensorflow trains the "
    "same model compiled"
)

_make_train_function: Callable = TorchTrainer.make_train_function
_taken: "weakref.WeakSet[Any]" = weakref.WeakSet()


def install(config: TrainingCompilerConfig) -> None:
    """Hooks the making of a model's train function, to count its steps."""
    TorchTrainer.make_train_function = _make_counting_train_function


def uninstall() -> None:
    """Leaves Keras as it was."""
    TorchTrainer.make_train_function = _make_train_function
    _taken.clear()


def take(model: Any, config: TrainingCompilerConfig, jit_compile: Any) -> None:
    """Says that `model` is not compiled.

    Raises:
        FallbackError: `fallback="error"`.
    """
    fallback.leave(CaptureError(REASON), config, how="as Keras runs it")
    _taken.add(model)


def forget(model: Any) -> None:
    """Stops counting."""
    _taken.discard(model)


def _make_counting_train_function(model: Any, force: bool = False) -> None:
    if model.train_function is not None and not force:
        return
    _make_train_function(model, force)
    if model not in _taken:
        return
    function = model.train_function

    def train_function(data: Any) -> Any:
        result = function(data)
        statistics().step_finished("eager", time.monotonic())
        return result

    model.train_function = train_function
