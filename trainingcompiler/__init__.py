"""trainingcompiler: run the training script you already have; every step of it becomes one XLA program.

```python
import trainingcompiler as tc

tc.enable()  # before or after `import torch`; or be explicit:
step = tc.compile(train_step)  # one function that does forward, backward and optimizer.step()
```

Importing this package does nothing else: no framework and no backend is loaded before it is needed.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from trainingcompiler._version import __version__

if TYPE_CHECKING:
    from trainingcompiler.config import TrainingCompilerConfig
    from trainingcompiler.errors import (
        CaptureError,
        ConfigError,
        FallbackError,
        GradientNotKeptError,
        NotEnoughMemoryError,
        TrainingCompilerError,
        UsageError,
    )
    from trainingcompiler.exit_codes import REQUEUE
    from trainingcompiler.frameworks.pytorch.checkpoints import Checkpoints
    from trainingcompiler.parallel.stop_signal import StopSignal
    from trainingcompiler.planning.batch_scaling import Scaled

__all__ = [
    "CaptureError",
    "Checkpoints",
    "ConfigError",
    "FallbackError",
    "GradientNotKeptError",
    "NotEnoughMemoryError",
    "REQUEUE",
    "StopSignal",
    "TrainingCompilerConfig",
    "TrainingCompilerError",
    "UsageError",
    "__version__",
    "compile",
    "disable",
    "enable",
    "recommendation",
    "tensor_parallel",
]

Function = TypeVar("Function", bound=Callable[..., Any])

_HOMES = {
    "Checkpoints": "frameworks.pytorch.checkpoints",
    "REQUEUE": "exit_codes",
    "StopSignal": "parallel.stop_signal",
    "TrainingCompilerConfig": "config",
    "tensor_parallel": "parallel.layer_rules",
}  # whatever else is public and not defined here is an error

_withdrawals: list[Callable[[], None]] = []


def enable(config: TrainingCompilerConfig | None = None) -> None:
    """Compiles the training steps of this process from now on, whether or not the framework is imported yet.

    Args:
        config: The options; None takes them from the environment. `TRAININGCOMPILER=0` turns even a given one off.

    Raises:
        ConfigError: The environment holds a wrong or an unknown TRAININGCOMPILER variable.
    """
    from trainingcompiler.adapters import dispatch, import_hooks
    from trainingcompiler.reporting import console, events, statistics

    disable()
    config, off_because = _effective(config)
    console.attach(quiet=config.quiet)
    hooked = dict(dispatch.HOOKED)
    if config.record:
        from trainingcompiler.planning import recommendation as recommended
        from trainingcompiler.reporting import run_record

        _withdrawals.append(run_record.keep(config, recommended.as_record()))
    if config.dump:
        from trainingcompiler.reporting import dump

        _withdrawals.append(dump.begin(config.dump))
    if off_because:
        events.emit(events.Started(versions={}, device="", compiled=False, reason=off_because))
        hooked = {name: adapter for name, adapter in hooked.items() if name in dispatch.ALWAYS_HOOKED}
    else:
        statistics.current()
        events.end_at_exit()
    for adapter in dict.fromkeys(hooked.values()):
        if adapter not in sys.modules:  # whoever imports it: we, when its framework is there, or the script itself
            _withdrawals.append(import_hooks.after_import(adapter, functools.partial(_enable_adapter, adapter, config)))
    for framework, adapter in hooked.items():
        _withdrawals.append(import_hooks.after_import(framework, functools.partial(_enable_adapter, adapter, config)))


def disable() -> None:
    """Takes back what `enable` did: steps from now on run as the framework runs them."""
    from trainingcompiler.adapters import dispatch

    while _withdrawals:
        _withdrawals.pop()()
    for adapter in reversed(dict.fromkeys(dispatch.HOOKED.values())):
        if adapter in sys.modules:
            sys.modules[adapter].disable()


def compile(train_step: Function, config: TrainingCompilerConfig | None = None) -> Function:
    """Returns `train_step` as a function that runs as one compiled program per signature of its arguments.

    Args:
        train_step: A function that does forward, backward and `optimizer.step()`; in TensorFlow, one that computes
            gradients and applies them. The adapter is chosen by what the function uses.
        config: As for `enable`.

    Raises:
        UsageError: The function trains nothing, or reaches no optimizer.
        ConfigError: As for `enable`.
    """
    from trainingcompiler.adapters import dispatch
    from trainingcompiler.compiling.gc_pause import gc_paused
    from trainingcompiler.reporting import console, events

    config, off_because = _effective(config)
    console.attach(quiet=config.quiet)
    if off_because:
        events.emit(events.Started(versions={}, device="", compiled=False, reason=off_because))
        return train_step
    with gc_paused():
        return importlib.import_module(dispatch.for_step(train_step)).compile(train_step, config)


def recommendation() -> Scaled | None:
    """What `launch --batch-size=...` recommends for this run, for scripts that set their batch themselves.

    A script that asks is taken to follow: nothing of it is rewritten.

    Returns:
        The recipe as it is (`before`), the recommended one (`recipe`) and the rule; None where the launcher was not
        asked for another batch, and while the script is being planned.

    Example:
        >>> wanted = tc.recommendation()
        >>> batch_size, lr = (wanted.recipe.batch_size, wanted.recipe.lr) if wanted else (32, 3e-4)
    """
    from trainingcompiler.planning import recommendation as recommended

    return recommended.current()


def _effective(config: TrainingCompilerConfig | None) -> tuple[TrainingCompilerConfig, str]:
    """Returns the configuration that holds, and why it compiles nothing, or ""."""
    from trainingcompiler.config import resolve

    surroundings = resolve({}, os.environ)
    if not surroundings.config.enabled:
        off = dataclasses.replace(config or surroundings.config, enabled=False)
        return off, "--no-compile or TRAININGCOMPILER=0 says so"
    chosen = config or surroundings.config
    return chosen, "" if chosen.enabled else "enabled=False"


def _enable_adapter(module_name: str, config: TrainingCompilerConfig) -> None:
    from trainingcompiler.compiling.gc_pause import gc_paused

    if module_name not in sys.modules:
        with gc_paused():
            importlib.import_module(module_name)  # it is enabled at the end of that
    elif hasattr(sys.modules[module_name], "enable"):  # or it is being imported right now, and imports its framework
        sys.modules[module_name].enable(config)


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module(f"trainingcompiler.{_HOMES.get(name, 'errors')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
