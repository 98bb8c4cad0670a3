"""Keras on TensorFlow: the train function of a model runs compiled steps."""

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.tensorflow.trainer import TensorFlowTrainer
from tensorflow.python.data.ops.iterator_ops import OwnedIterator

from trainingcompiler.adapters import fallback
from trainingcompiler.adapters.patches import Patches
from trainingcompiler.config import TrainingCompilerConfig
from trainingcompiler.errors import CaptureError
from trainingcompiler.frameworks import tensorflow as adapter
from trainingcompiler.frameworks.keras import apply_recommendation, layers
from trainingcompiler.frameworks.keras.counting import count_steps
from trainingcompiler.frameworks.tensorflow.batches import next_batch
from trainingcompiler.frameworks.tensorflow.engine import TF_GRAPH, TF_XLA, XLA
from trainingcompiler.frameworks.tensorflow.runner import StepRunner
from trainingcompiler.frameworks.tensorflow.tracing import Shapes, Traces, is_input

_make_train_function: Callable = TensorFlowTrainer.make_train_function
_patches = Patches()
_taken: "weakref.WeakKeyDictionary[Any, tuple[TrainingCompilerConfig, Any]]" = weakref.WeakKeyDictionary()


def install(config: TrainingCompilerConfig) -> None:
    """Prepares TensorFlow, and hooks the making of a model's train function."""
    adapter.prepare(config, keras=keras.__version__)
    why = "the step that fit calls"
    _patches.replace(TensorFlowTrainer, "make_train_function", _make_hooked_train_function, why)
    apply_recommendation.install()


def uninstall() -> None:
    """Leaves Keras and TensorFlow as they were."""
    _patches.restore()
    apply_recommendation.uninstall()
    for model in list(_taken):
        if isinstance(model.train_function, TrainFunction):
            model.train_function = None
    _taken.clear()
    adapter.disable()


def take(model: Any, config: TrainingCompilerConfig, jit_compile: Any) -> None:
    """Has `model` train through compiled steps; `jit_compile` is what the script gave to `model.compile`."""
    _taken[model] = (config, jit_compile)
    own = type(model).make_train_function
    if own is not TensorFlowTrainer.make_train_function and "__class__" not in own.__code__.co_freevars:  # no super()
        where = f"{own.__code__.co_filename.rsplit('/', 1)[-1]}:{own.__code__.co_firstlineno}"
        fallback.leave(
            CaptureError("the model has a make_train_function of its own", where), config, how="as Keras runs it"
        )
        count_steps(model, "tensorflow")


def forget(model: Any) -> None:
    """Has `model` train as Keras trains it."""
    _taken.pop(model, None)


def _make_hooked_train_function(model: Any, force: bool = False) -> Any:
    if model.train_function is not None and not force:
        return model.train_function
    if model not in _taken:
        return _make_train_function(model, force)
    with _own_step() as steps:
        _make_train_function(model, force)
    config, jit_compile = _taken[model]
    step = steps[-1] if steps else None
    model.train_function = TrainFunction(model, model.train_function, step, config, jit_compile)
    return model.train_function


@contextlib.contextmanager
def _own_step() -> Iterator[list[Any]]:
    """Keeps the `tf.function` of one step that Keras makes inside: what it has traced, Keras does not trace again."""
    steps: list[Any] = []
    original: Callable = TensorFlowTrainer._autoconvert_optionals

    @functools.wraps(original)
    def keeping(model: Any, step: Any) -> Any:
        steps.append(step)
        return original(model, step)

    TensorFlowTrainer._autoconvert_optionals = keeping
    try:
        yield steps
    finally:
        TensorFlowTrainer._autoconvert_optionals = original


class TrainFunction:
    """What `fit` and `train_on_batch` call for every step: takes a batch, runs the step, returns the logs.

    The batches are taken here and not inside a TensorFlow graph; each is used once, whoever runs the step. The step is
    Keras's own `tf.function`, traced with the signature that Keras would give it.
    """

    def __init__(self, model: Any, native: Callable, step: Any, config: TrainingCompilerConfig, jit_compile: Any):
        self._model = weakref.proxy(model)
        self._native = native
        engines = [XLA, TF_GRAPH, TF_XLA]
        if jit_compile in (True, False):
            engines.remove(TF_GRAPH if jit_compile else TF_XLA)
        self._runner = StepRunner(
            Traces(lambda data: step.get_concrete_function(data), is_checked=not model.jit_compile),
            lambda data: native(iter([data])),
            config,
            name="train_step",
            labels=_labels,
            engines=engines,
            tensor_dims=lambda: layers.tensor_dims(self._model),
        )
        self._is_checked = False
        self._iterator: Callable = lambda: None
        self._shapes: Shapes | None = None

    def __call__(self, iterator: Any) -> Any:
        """Runs `steps_per_execution` steps, or as many as there is data for, and returns the last one's logs."""
        if not self._is_checked:
            self._is_checked = True
            error = _obstacle(self._model)
            if error is not None:
                self._runner.leave_to_tensorflow(error)
        if self._runner.is_native:
            apply_recommendation.see_first_step(self._model.optimizer, None)
            return self._run_native(iterator)
        shapes = self._shapes_from(iterator)
        logs = None
        for index in range(self._model.steps_per_execution):
            try:
                data = next_batch(iterator)
            except (StopIteration, tf.errors.OutOfRangeError):
                if index == 0:
                    raise
                break
            data = _without_optionals(data)
            apply_recommendation.see_first_step(self._model.optimizer, data)
            logs = self._runner(data, shapes=shapes)
        return logs

    def _shapes_from(self, iterator: Any) -> Shapes | None:
        """What Keras knows of the shapes of an iterator's batches when it traces the step; None is all."""
        if not isinstance(iterator, OwnedIterator):
            return None
        if self._iterator() is not iterator:
            self._iterator = weakref.ref(iterator)
            specs = tf.nest.flatten(iterator.element_spec)
            self._shapes = tuple(_sizes(getattr(spec, "shape", None)) for spec in specs)
        return self._shapes

    def _run_native(self, iterator: Any) -> Any:
        logs = self._native(iterator)
        self._runner.count_native(self._model.steps_per_execution)
        return logs


def _obstacle(model: Any) -> CaptureError | None:
    """Why the model cannot be compiled, whatever its steps are."""
    if model.run_eagerly:
        return CaptureError("model.compile(run_eagerly=True) asks for it")
    if tf.config.functions_run_eagerly():
        return CaptureError("tf.config.run_functions_eagerly(True) asks for it")
    if tf.distribute.in_cross_replica_context() and tf.distribute.has_strategy() or model._distribute_strategy:
        return CaptureError("the model was made under a tf.distribute strategy, which distributes its steps itself")
    return None


def _sizes(shape: Any) -> tuple[int | None, ...] | None:
    return tuple(shape.as_list()) if isinstance(shape, tf.TensorShape) and shape.rank is not None else None


def _labels(data: Any) -> list[str]:
    """What a person calls the leaves of a batch."""
    parts = data if isinstance(data, tuple) else (data,)
    names = ["x", "y", "sample_weight"] if len(parts) <= 3 else [f"part {index}" for index in range(len(parts))]
    return [name for name, part in zip(names, parts, strict=False) for _ in tf.nest.flatten(part)]


def _without_optionals(data: Any) -> Any:
    if all(leaf is None or is_input(leaf) for leaf in tf.nest.flatten(data)):
        return data
    return keras.tree.map_structure(lambda leaf: None if isinstance(leaf, tf.experimental.Optional) else leaf, data)
