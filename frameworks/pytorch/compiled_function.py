"""`tc.compile`: one function that does forward, backward and `optimizer.step()`, as one program."""

import contextlib
import functools
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook

from trainingcompiler.config import TrainingCompilerConfig
from trainingcompiler.errors import CaptureError, UsageError
from trainingcompiler.frameworks.pytorch.interop.dynamo import left_out
from trainingcompiler.frameworks.pytorch.interop.passthrough import passthrough
from trainingcompiler.frameworks.pytorch.interop.source_lines import user_line
from trainingcompiler.frameworks.pytorch.patches import gradient_property
from trainingcompiler.frameworks.pytorch.patches.install import Hooks
from trainingcompiler.frameworks.pytorch.session.ddp import averages_unseen
from trainingcompiler.frameworks.pytorch.session.engine_choice import EngineSelector, engine_of
from trainingcompiler.frameworks.pytorch.session.engine_trial import turns_on
from trainingcompiler.frameworks.pytorch.session.fallback import ANOMALY
from trainingcompiler.frameworks.pytorch.session.session import Session
from trainingcompiler.planning import planner
from trainingcompiler.reporting.statistics import current as statistics


class CompiledFunction:
    """A train step whose Python runs at every call, and what it asks torch for as one compiled program.

    The first call runs in torch: it creates the optimizer's state, and shows which optimizers the function reaches.
    """

    def __init__(self, train_step: Callable, config: TrainingCompilerConfig):
        functools.update_wrapper(self, train_step)
        self._function = train_step
        self._session = Session(config)
        self._choice = EngineSelector(
            engine_of(config, self._session.programs.target), turns_on(self._session.programs)
        )
        self._session.registry.on_step = lambda optimizer, engine: None
        self._optimizers: list[torch.optim.Optimizer] = []
        self._is_eager = config.engine == "eager"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Does one step, and returns what the function returns.

        Raises:
            UsageError: The function reaches no optimizer, or changes no parameter.
            FallbackError: It cannot be compiled, and `fallback="error"`.
        """
        if planner.current is not None:
            planner.current.left("it is a function given to tc.compile, whose first call runs in PyTorch")
        if not self._optimizers:
            return self._observe(args, kwargs)
        if self._is_eager or not self._choice.defers or self._is_watched():
            with passthrough():
                result = self._function(*args, **kwargs)
            self._finished("eager")
            return result
        fallbacks = self._session.fallbacks.count
        with self._recording():
            result = self._function(*args, **kwargs)
            self._session.settle()
            result = self._session.real(result)
        self._finished("xla" if fallbacks == self._session.fallbacks.count else "eager")
        return result

    @contextlib.contextmanager
    def _recording(self) -> Iterator[None]:
        hooks = Hooks(self._session)
        outer, _open[:] = list(_open), [self._session]
        for session in outer:
            session.is_closed = True
        self._session.deferring = True
        gradient_property.unwatch_gradients(self._session.registry)
        hooks.install()
        try:
            yield
        finally:
            self._session.is_in_torch = False
            hooks.uninstall()
            gradient_property.watch_gradients(self._session.registry)
            _open[:] = outer
            for session in outer:
                session.is_closed = False

    def _is_watched(self) -> bool:
        if torch.is_anomaly_enabled():
            self._session.fallbacks.say(CaptureError(ANOMALY, user_line()))
        return torch.is_anomaly_enabled()

    def _observe(self, args: tuple, kwargs: dict) -> Any:
        modules: dict[int, nn.Module] = {}
        stepped: dict[int, torch.optim.Optimizer] = {}

        def note_module(module: nn.Module, _: Any) -> None:
            modules[id(module)] = module

        def note_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            stepped[id(optimizer)] = optimizer

        of_modules = register_module_forward_pre_hook(note_module)
        of_steps = register_optimizer_step_post_hook(note_step)
        try:
            with passthrough(), left_out(), warnings.catch_warnings():  # Dynamo would see, and compile, our two hooks
                warnings.filterwarnings("ignore", "Using `torch.compile.module.` when there are global hooks")  # ours
                result = self._function(*args, **kwargs)
        finally:
            of_modules.remove()
            of_steps.remove()
        name = getattr(self._function, "__name__", "the function")
        if not stepped:
            raise UsageError(
                f"tc.compile({name}): {name} has run once and has called no optimizer.step(), so there is no training "
                "step to compile. Pass the function that does forward, backward and optimizer.step()."
            )
        optimizers = list(stepped.values())
        if not any(p.grad is not None or o.state for o in optimizers for g in o.param_groups for p in g["params"]):
            raise UsageError(
                f"tc.compile({name}): {name} has called optimizer.step(), but no parameter had a gradient, so nothing "
                "was trained. Call loss.backward() inside the function."
            )
        registry = self._session.registry
        gradient_property.watch_gradients(registry)  # the step stores none that it clears itself at its next call
        weakref.finalize(self, gradient_property.unwatch_gradients, registry).atexit = False
        self._optimizers = optimizers
        for optimizer in optimizers:
            registry.register(optimizer)
            registry.stepped(optimizer, "eager")
            registry.habits(optimizer).clears = all(
                p.grad is None for group in optimizer.param_groups for p in group["params"]
            )
        if any(isinstance(module, DistributedDataParallel) and averages_unseen(module) for module in modules.values()):
            reason = "DistributedDataParallel in a function given to tc.compile averages in torch only"
            self._session.fallbacks.leave(
                CaptureError(f"{reason}; run the plain loop under the launcher", user_line()), [self]
            )
            self._is_eager = True
        self._finished("eager")
        return result

    def _finished(self, engine: str) -> None:
        waited = self._session.programs.policy.step_ended()
        engine = "eager" if waited else engine
        statistics().step_finished(engine, time.monotonic())
        self._choice.stepped(self._optimizers[0], engine, waited=waited)


_open: list[Session] = []
"""The sessions that watch this process now; a function that is compiled alone takes their place while it runs."""
