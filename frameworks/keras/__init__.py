"""The Keras adapter: `model.compile` is hooked, and `fit` trains through compiled steps; everything else stays
Keras's."""

import importlib
from typing import Any

from trainingcompiler.config import TrainingCompilerConfig

_active: Any = None


def enable(config: TrainingCompilerConfig) -> None:
    """Hooks Keras: models that are compiled from now on train through compiled steps.

    Args:
        config: The options. With `enabled=False` models train as Keras trains them, and `model.compile` only
            accepts, and ignores by the person's own word, `training_compiler=`.
    """
    global _active
    from trainingcompiler.frameworks.keras import hooks

    disable()
    _active = hooks.Hooks(config)
    _active.install()


def disable() -> None:
    """Leaves Keras as it was; what has been computed stays."""
    global _active
    active, _active = _active, None
    if active is not None:
        active.uninstall()


def backend_module(name: str) -> Any:
    """The part of this adapter that knows a backend of Keras."""
    return importlib.import_module(f"trainingcompiler.frameworks.keras.{name}_backend")
