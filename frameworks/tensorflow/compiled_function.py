"""`tc.compile` of a hand-written TensorFlow step: a function with a `GradientTape` that assigns variables."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tensorflow.python.eager.polymorphic_function.polymorphic_function import Function

from trainingcompiler.config import TrainingCompilerConfig
from trainingcompiler.errors import UsageError
from trainingcompiler.frameworks.tensorflow.engine import TF_GRAPH, TF_XLA, XLA
from trainingcompiler.frameworks.tensorflow.programs import NothingTrained
from trainingcompiler.frameworks.tensorflow.runner import StepRunner
from trainingcompiler.frameworks.tensorflow.tracing import Traces


class CompiledFunction:
    """A train step that runs as one compiled program per signature of its arguments.

    It is traced by `tf.function`, by the script's own where the step is one: Python's own side effects happen while
    tracing, arrays and tensors are inputs, and every other value of an argument is a constant, compiled again when it
    changes.
    """

    def __init__(self, train_step: Any, config: TrainingCompilerConfig):
        functools.update_wrapper(self, train_step)
        is_traced = isinstance(train_step, Function)
        function = train_step.python_function if is_traced else train_step
        self._traced = train_step if is_traced else tf.function(train_step)
        self._name = getattr(function, "__name__", "train_step")
        self._signature = inspect.signature(function)
        self._config = config
        engines = [XLA, TF_GRAPH, TF_XLA]
        if is_traced and train_step._jit_compile is not None:
            engines.remove(TF_GRAPH if train_step._jit_compile else TF_XLA)
        self._runner = StepRunner(
            Traces(self._trace, is_checked=not self._traced._jit_compile),
            lambda args, kwargs: train_step(*args, **kwargs),
            config,
            name=self._name,
            labels=self._labels,
            engines=engines,
            native_is_graph=is_traced,
            where=_where(function),
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Does one step, and returns what the function returns.

        Raises:
            UsageError: The function assigns no variable.
            FallbackError: It cannot be compiled, and `fallback="error"`.
        """
        try:
            given = self._signature.bind(*args, **kwargs)
            given.apply_defaults()  # so that arguments come in the order of the signature, as TensorFlow has them
            return self._runner(given.args, given.kwargs)
        except NothingTrained:
            raise UsageError(
                f"tc.compile({self._name}): {self._name} assigns no tf.Variable, so there is no training step to "
                "compile. Pass the function that computes gradients and applies them."
            ) from None

    def _trace(self, args: tuple, kwargs: dict) -> Any:
        leaves = tf.nest.flatten((args, kwargs))
        if not any(isinstance(leaf, tf.Variable) for leaf in leaves):
            return self._traced.get_concrete_function(*args, **kwargs)

        def step(*tensors: tf.Tensor) -> Any:  # a variable among the arguments is closed over, as all others are
            given = iter(tensors)
            filled = [next(given) if isinstance(leaf, tf.TensorSpec) else leaf for leaf in leaves]
            ours, named = tf.nest.pack_sequence_as((args, kwargs), filled)
            return self._traced(*ours, **named)

        specs = [leaf for leaf in leaves if isinstance(leaf, tf.TensorSpec)]
        return tf.function(step, autograph=False, jit_compile=self._traced._jit_compile).get_concrete_function(*specs)

    def _labels(self, args: tuple, kwargs: dict) -> list[str]:
        arguments = self._signature.bind(*args, **kwargs).arguments
        named = [(name, value) for name, value in arguments.items() if name not in kwargs]
        named += [(name, kwargs[name]) for name in sorted(kwargs)]  # as tf.nest orders them
        return [name for name, value in named for _ in tf.nest.flatten(value)]


def _where(function: Callable) -> str | None:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{code.co_filename.rsplit('/', 1)[-1]}:{code.co_firstlineno}" if code else None
