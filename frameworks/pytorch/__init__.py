"""The PyTorch adapter: an unmodified training loop becomes one XLA program per step, by deferring it."""

import os
import time
import warnings
from collections.abc import Callable

import jax
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from trainingcompiler.cache import jax_cache
from trainingcompiler.config import TrainingCompilerConfig
from trainingcompiler.errors import UsageError
from trainingcompiler.frameworks.pytorch.aot.shown_gpu import ShownGpu
from trainingcompiler.frameworks.pytorch.aot.skip_init import SkipParameterInit
from trainingcompiler.frameworks.pytorch.compiled_function import CompiledFunction
from trainingcompiler.frameworks.pytorch.interop.critical_section import section
from trainingcompiler.frameworks.pytorch.patches.install import Hooks
from trainingcompiler.frameworks.pytorch.session.engine_choice import EngineSelector, engine_of
from trainingcompiler.frameworks.pytorch.session.engine_trial import turns_on
from trainingcompiler.frameworks.pytorch.session.session import Session
from trainingcompiler.planning import planner
from trainingcompiler.processes import rendezvous
from trainingcompiler.reporting.events import Note, Started, emit
from trainingcompiler.reporting.statistics import current as statistics
from trainingcompiler.targets.target import Target

_hooks: Hooks | None = None
_refusal: RemovableHandle | None = None
_watches_forks = False


def enable(config: TrainingCompilerConfig) -> None:
    """Hooks torch: loops that train are compiled from now on.

    Args:
        config: The options.
    """
    global _hooks, _refusal, _watches_forks
    disable()
    if config.engine == "tensorflow":  # whether this run trains with PyTorch shows at its first step
        _refusal = register_optimizer_step_pre_hook(lambda *_: _refuse_engine(config))
        return
    _prepare(config)
    if planner.current is not None and not planner.current.fills_weights:
        planner.current.surroundings.enter_context(SkipParameterInit())
    if planner.current is not None and planner.current.gpu is not None:
        planner.current.surroundings.enter_context(ShownGpu(planner.current.gpu))
    if not _watches_forks:
        os.register_at_fork(before=_before_fork, after_in_parent=section.let_go, after_in_child=_leave_child)
        _watches_forks = True
    session = Session(config)
    choice = EngineSelector(engine_of(config, session.programs.target), turns_on(session.programs))
    session.deferring = choice.defers

    def on_step(optimizer: torch.optim.Optimizer, engine: str) -> None:
        statistics().step_finished(engine, time.monotonic())
        waited = session.programs.policy.step_ended()
        choice.stepped(optimizer, engine, session.registry.is_same_batch, waited)
        session.deferring = choice.defers

    session.registry.on_step = on_step
    _hooks = Hooks(session)
    _hooks.install()


def compile(train_step: Callable, config: TrainingCompilerConfig) -> Callable:
    """Returns `train_step` as one compiled program per signature of its arguments; see `trainingcompiler.compile`."""
    _refuse_engine(config)
    _prepare(config)
    return CompiledFunction(train_step, config)


def disable() -> None:
    """Leaves torch as it was; what has been computed stays."""
    global _hooks, _refusal
    if _refusal is not None:
        _refusal.remove()
        _refusal = None
    hooks, _hooks = _hooks, None
    if hooks is not None:
        try:
            hooks.session.finish()
        finally:
            hooks.uninstall()


def current_session() -> Session | None:
    """The session that is hooked into torch, if one is."""
    return _hooks.session if _hooks is not None else None


def _refuse_engine(config: TrainingCompilerConfig) -> None:
    if config.engine == "tensorflow":
        raise UsageError(
            "engine=tensorflow is for TensorFlow and Keras, and this is a step of PyTorch. To have PyTorch run its own "
            'steps: --engine=eager, or TrainingCompilerConfig(engine="eager")'
        )


def _prepare(config: TrainingCompilerConfig) -> None:
    # JAX warns on every fork once it has started. Forked children (`DataLoader` workers) run plain torch only.
    warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
    jax_cache.enable_persistent_cache(config.cache_dir, int(config.cache_size_gb * 1e9))
    if note := rendezvous.share_gpus(os.environ):  # under the launcher it has been said already
        emit(Note(text=note))
    target = Target.of(config)
    versions = {
        "torch": torch.__version__,
        "jax": jax.__version__,
    }
    compiled = config.engine != "eager"
    if compiled and planner.current is None and (store := jax_cache.store()) is not None:
        store.begin(target)
    reason = "" if compiled else "--engine=eager says so"
    emit(Started(versions=versions, device=target.description, compiled=compiled, reason=reason))


def _before_fork() -> None:
    section.hold()
    if _hooks is not None:
        _hooks.session.thread.before_fork()


def _leave_child() -> None:
    """A forked process (a `DataLoader` worker) computes nothing on the parent's device: it gets plain torch."""
    global _hooks
    section.renew()
    if _hooks is not None:
        _hooks.session.thread.leave_child()
        _hooks.uninstall()
        _hooks = None
