"""Keras on PyTorch is not compiled: its optimizers are Keras's own, written in Python, and not `torch.optim`'s.

The script trains as Keras trains it, and one line says so and what to do; the steps are counted.
"""

from typing import Any

from trainingcompiler.adapters import fallback
from trainingcompiler.config import TrainingCompilerConfig
from trainingcompiler.errors import CaptureError
from trainingcompiler.frameworks.keras.counting import count_steps

REASON = (
    "Keras on PyTorch steps with optimizers of its own, which are not captured. KERAS_BACKEND=tensorflow trains the "
    "same model compiled"
)


def install(config: TrainingCompilerConfig) -> None:
    """Prepares nothing: Keras trains."""


def uninstall() -> None:
    """Leaves nothing to undo: what counts steps belongs to the models."""


def take(model: Any, config: TrainingCompilerConfig, jit_compile: Any) -> None:
    """Says that `model` is not compiled, and counts its steps.

    Raises:
        FallbackError: `fallback="error"`.
    """
    fallback.leave(CaptureError(REASON), config, how="as Keras runs it")
    count_steps(model, "eager")


def forget(model: Any) -> None:
    """Has nothing to forget."""
