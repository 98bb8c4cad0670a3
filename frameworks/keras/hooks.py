"""The hook on `model.compile`: who is to train the model, and with which options."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import keras
from keras.src.trainers.trainer import Trainer

from trainingcompiler.adapters.patches import Patches
from trainingcompiler.config import TrainingCompilerConfig
from trainingcompiler.errors import UsageError
from trainingcompiler.frameworks.keras import backend_module
from trainingcompiler.frameworks.keras.counting import count_steps, stop_counting
from trainingcompiler.processes import rendezvous

_BACKENDS = ("tensorflow", "jax", "torch")
_OPTION = "training_compiler"


class Hooks:
    """Keras's own `compile`, and ours in its place while installed."""

    def __init__(self, config: TrainingCompilerConfig):
        self._config = config
        self._compile: Callable = Trainer.compile
        self._backend: Any = None
        self._patches = Patches()

    def install(self) -> None:
        """Puts ours in front of Keras's."""
        compile_model = self._compile
        parameters = list(inspect.signature(compile_model).parameters)[1:]

        @functools.wraps(compile_model)
        def compile(model: Any, *args: Any, training_compiler: Any = None, **kwargs: Any) -> None:
            config = self._chosen(training_compiler)
            compile_model(model, *args, **kwargs)
            stop_counting(model)
            if config is None:
                self._forget(model)
                if self._config.enabled:  # this run is compiled, and this model is not, by the script's own word
                    count_steps(model, "tensorflow" if keras.backend.backend() == "tensorflow" else "eager")
                return
            given = dict(zip(parameters, args, strict=False)) | kwargs
            self._prepared(config).take(model, config, jit_compile=given.get("jit_compile", "auto"))

        self._patches.replace(Trainer, "compile", compile, "its option training_compiler, and who is to train")

    def uninstall(self) -> None:
        """Leaves Keras as it was."""
        self._patches.restore()
        if self._backend is not None:
            self._backend.uninstall()

    def _chosen(self, option: Any) -> TrainingCompilerConfig | None:
        """The options for one model; None where it is to train as Keras trains it."""
        if option is None or isinstance(option, bool):
            config = self._config
        elif isinstance(option, TrainingCompilerConfig):
            config = option
        else:
            raise UsageError(
                f"model.compile({_OPTION}={option!r}): must be True, False or a trainingcompiler.TrainingCompilerConfig"
            )
        # --no-compile and TRAININGCOMPILER=0 overrule what the script says.
        return config if config.enabled and self._config.enabled and option is not False else None

    def _prepared(self, config: TrainingCompilerConfig) -> Any:
        if self._backend is None:
            name = keras.backend.backend()
            if name not in _BACKENDS:
                raise UsageError(
                    f"Keras's backend {name} cannot train through trainingcompiler; set KERAS_BACKEND=tensorflow, "
                    "or run with --no-compile"
                )
            if name != "torch":
                rendezvous.refuse_several(f"Keras on {name}")
            backend = backend_module(name)
            backend.install(config)
            self._backend = backend
        return self._backend

    def _forget(self, model: Any) -> None:
        if self._backend is not None:
            self._backend.forget(model)
