"""Keras on JAX: the step is one XLA program already. We compile it ahead of time, say what it needs, and count."""

import time
import weakref
from collections.abc import Callable
from typing import Any

import jax
import keras
from keras.src.backend.jax import trainer as keras_trainer

from trainingcompiler.adapters import fallback
from trainingcompiler.adapters.patches import Patches
from trainingcompiler.cache import jax_cache
from trainingcompiler.config import TrainingCompilerConfig
from trainingcompiler.errors import CaptureError, UsageError
from trainingcompiler.frameworks.keras.counting import Counted
from trainingcompiler.reporting.events import Recompiled, Started, emit, phase
from trainingcompiler.reporting.statistics import current as statistics
from trainingcompiler.targets.target import Target
from trainingcompiler.targets.xla_options import sound_fusions

_make_train_function: Callable = keras_trainer.JAXTrainer.make_train_function
_patches = Patches()
_taken: "weakref.WeakKeyDictionary[Any, TrainingCompilerConfig]" = weakref.WeakKeyDictionary()


def install(config: TrainingCompilerConfig) -> None:
    """Hooks the making of a model's train function.

    Raises:
        UsageError: The engine is one of another framework.
    """
    if config.engine in ("eager", "tensorflow"):
        raise UsageError(
            f"engine={config.engine} is not for Keras on JAX, whose step is a program of XLA already: --engine=auto, "
            "or KERAS_BACKEND=tensorflow"
        )
    if config.devices != 1:
        raise UsageError(
            f"--devices={config.devices}: Keras on JAX divides its work by keras.distribution.set_distribution(...); "
            "for --devices, take KERAS_BACKEND=tensorflow or torch"
        )
    jax_cache.enable_persistent_cache(config.cache_dir, int(config.cache_size_gb * 1e9))
    versions = {"keras": keras.__version__, "jax": jax.__version__}
    emit(Started(versions=versions, device=Target.local().description, compiled=True, reason="Keras does it on JAX"))
    why = "the step that fit calls"
    _patches.replace(keras_trainer.JAXTrainer, "make_train_function", _make_hooked_train_function, why)


def uninstall() -> None:
    """Leaves Keras as it was."""
    _patches.restore()
    for model in list(_taken):
        model.train_function = None
    _taken.clear()


def take(model: Any, config: TrainingCompilerConfig, jit_compile: Any) -> None:
    """Has the steps of `model` counted; `jit_compile` is what the script gave to `model.compile`."""
    _taken[model] = config


def forget(model: Any) -> None:
    """Leaves `model` to Keras."""
    _taken.pop(model, None)


def _make_hooked_train_function(model: Any, force: bool = False) -> None:
    if model.train_function is not None and not force:
        return
    if model not in _taken:
        _make_train_function(model, force)
        return
    if model.run_eagerly or not model.jit_compile:
        asked = "run_eagerly=True" if model.run_eagerly else "jit_compile=False"
        fallback.leave(CaptureError(f"model.compile({asked}) asks for it"), _taken[model], how="as Keras runs it")
        _make_train_function(model, force)
        model.train_function = Counted(model.train_function, model.steps_per_execution, "eager")
        return
    original = keras_trainer.jit
    keras_trainer.jit = lambda step, **options: PlannedStep(original(step, **options))
    try:
        _make_train_function(model, force)
    finally:
        keras_trainer.jit = original


class PlannedStep:
    """Keras's own compiled step, compiled ahead of time so that its memory is known before it runs."""

    def __init__(self, step: Any):
        self._step = step
        self._programs: dict[tuple, Callable] = {}

    def __call__(self, state: Any, data: Any) -> Any:
        """Runs one step."""
        leaves, structure = jax.tree.flatten(data)
        key = (structure, *((leaf.shape, leaf.dtype) for leaf in leaves))
        if key not in self._programs:
            self._programs[key] = self._compiled(key, state, data)
        result = self._programs[key](state, data)
        statistics().step_finished("xla", time.monotonic())
        return result

    def _compiled(self, key: tuple, state: Any, data: Any) -> Callable:
        start_s = time.perf_counter()
        with phase("lower", "train_step"):
            lowered = self._step.lower(state, data)
        with phase("compile", "train_step") as running:
            with jax_cache.watching() as outcome:
                compiled = lowered.compile(compiler_options=sound_fusions(jax.default_backend()))
            plan: Any = compiled.memory_analysis()
            needed = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
            needed_mb = (needed + plan.temp_size_in_bytes) / 1e6
            running.detail = ", ".join(filter(None, ["train_step", outcome.detail, f"needs {needed_mb:,.1f} MB"]))
        duration_s = time.perf_counter() - start_s
        statistics().compiles += 1
        statistics().compile_time_s += duration_s
        statistics().cache_hits += bool(outcome.hit)
        if self._programs:
            self._explain(key, duration_s)
        return compiled

    def _explain(self, key: tuple, duration_s: float) -> None:
        last = next(reversed(self._programs))
        changed = [
            f"input {index} {old[1]}{list(old[0])} -> {new[1]}{list(new[0])}"
            for index, (old, new) in enumerate(zip(last[1:], key[1:], strict=False))
            if old != new
        ]
        emit(
            Recompiled(
                changed=", ".join(changed) or "the structure of the batch",
                where=None,
                count=len(self._programs) + 1,
                compile_time_s=duration_s,
                cure="batch(..., drop_remainder=True), if it is the last, smaller batch of an epoch; "
                "pad to few lengths otherwise",
            )
        )
