"""Runs a training step: finds or makes its program, chooses who runs it, and falls back with a word about why."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import tensorflow as tf
from tensorflow.python.framework.ops import EagerTensor

from trainingcompiler.adapters import fallback
from trainingcompiler.config import TrainingCompilerConfig
from trainingcompiler.errors import CaptureError, NotEnoughMemoryError, TrainingCompilerError
from trainingcompiler.frameworks.tensorflow.engine import TF_GRAPH, TF_XLA, XLA, EngineSelector
from trainingcompiler.frameworks.tensorflow.lines import line_of
from trainingcompiler.frameworks.tensorflow.programs import NothingTrained, Refused, TracedStep, captured, tensors_of
from trainingcompiler.frameworks.tensorflow.recorded_step import CalledStep
from trainingcompiler.frameworks.tensorflow.tracing import Shapes, Trace, Traces, is_input
from trainingcompiler.planning import planner
from trainingcompiler.planning.memory_advice import with_memory_advice
from trainingcompiler.reporting.events import Note, Recompiled, emit
from trainingcompiler.reporting.statistics import current as statistics
from trainingcompiler.targets.target import Target

_MOST_PROGRAMS = 32  # for one step; beyond, its shapes or constants change too often for compiling to pay
_MOST_REFUSALS = 3  # steps that TensorFlow has run again without an error; then it runs all

Native = Callable[..., Any]


class StepRunner:
    """Runs a step on the arguments of each call, compiled where that is possible and the fastest.

    Attributes:
        is_native: Whether TensorFlow runs the step from now on, as it would without us.
    """

    def __init__(
        self,
        traces: Traces,
        native: Native,
        config: TrainingCompilerConfig,
        *,
        name: str,
        labels: Callable[..., Sequence[str]] | None = None,
        engines: Sequence[str] = (XLA, TF_GRAPH, TF_XLA),
        native_is_graph: bool = True,
        where: str | None = None,
        tensor_dims: Callable[[], Mapping[int, int]] | None = None,
    ):
        """Prepares; nothing is traced before the first call.

        Args:
            traces: The step: its arguments are nested structures of tensors; it assigns variables.
            native: Does the same as TensorFlow would without us; called with the same arguments.
            config: The options; `engine` narrows `engines`.
            name: What the program is called.
            labels: What a person calls the leaves of the arguments, given the arguments.
            engines: Who may run the step.
            native_is_graph: Whether `native` is the traced `tf.function`, and not Python.
            where: The script's line that the step belongs to, if it is known.
            tensor_dims: Tells along which dims devices that share a layer divide variables, by identity; None where
                nothing knows them by name.
        """
        self._traces, self._native, self._config = traces, native, config
        self._name, self._labels, self._where = name, labels, where
        self._native_is_graph = native_is_graph
        self._tensor_dims = tensor_dims
        self._steps: dict[tuple, TracedStep] = {}
        self._graphs: dict[tuple, Trace] = {}
        self._refusals = 0
        self._typical: tuple | None = None
        self.is_native = config.engine == "tensorflow"
        self._target = Target.of(config)
        # TensorFlow has no step for several devices, with which ours could be compared.
        chooses = config.engine == "auto" and self._target.device_count == 1
        self._choice = EngineSelector(engines if chooses else (XLA,))

    def __call__(self, *args: Any, shapes: Shapes | None = None) -> Any:
        """Does one step, and returns what the function returns.

        Args:
            *args: The step's.
            shapes: What TensorFlow would know of their leaves' shapes when it traces the step; None is all.

        Raises:
            FallbackError: It cannot be compiled, and `fallback="error"`.
        """
        if self.is_native or not tf.executing_eagerly():
            return self.run_native(*args)
        leaves = tf.nest.flatten(args)
        if planner.current is not None:
            planner.current.take(self._called(args, shapes))
        key = ((shapes, _structure(args)), *_signature(leaves))
        start_s = time.perf_counter()
        step = self._steps.get(key)
        is_new = step is None
        if step is None:
            if self._choice.chosen == TF_GRAPH and self._native_is_graph:  # new shapes need no export for that
                return self._run_graph(key, args, leaves, shapes)
            try:
                step = self._capture(key, args, leaves, shapes)
            except NothingTrained:
                raise
            except CaptureError as error:
                return self._fall_back(error, args)
        engine = self._choice.next
        if engine == XLA:
            self._compile(step, args, shapes)
        try:
            result = self._run(engine, step, leaves)
        except Refused as refused:
            return self._run_refused(refused, step, args, leaves)
        self._choice.ran(engine, time.perf_counter() - start_s, not is_new and key == self._typical)
        statistics().step_finished("xla" if engine == XLA else "tensorflow", time.monotonic())
        return result

    def _called(self, args: tuple, shapes: Shapes | None) -> CalledStep:
        return CalledStep(self._traces, args, self._labels_of(args), shapes, self._tensor_dims)

    def run_native(self, *args: Any) -> Any:
        """Lets TensorFlow do one step as it would without us."""
        if planner.current is not None:
            planner.current.left("TensorFlow would run it")
        result = self._native(*args)
        self.count_native(1)
        return result

    def count_native(self, steps: int) -> None:
        """Counts steps that TensorFlow has just run."""
        for _ in range(steps):
            statistics().step_finished("tensorflow", time.monotonic())

    def leave_to_tensorflow(self, error: CaptureError) -> None:
        """Has TensorFlow run every step from now on, and says why.

        Raises:
            FallbackError: `fallback="error"` forbids it.
        """
        error.where = error.where or self._where
        if planner.current is not None:
            planner.current.left(f"TensorFlow would run it, because {error}")
        fallback.leave(error, self._config, how="as TensorFlow runs it")
        self.is_native = True

    def _run(self, engine: str, step: TracedStep, leaves: Sequence[Any]) -> Any:
        if engine == XLA:
            return step.run(leaves)
        if engine == TF_XLA and step.is_sound:
            try:
                return step.run_in_tensorflow(leaves, jit_compile=True)
            except (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError, tf.errors.InternalError) as error:
                # One cluster of XLA: it has not run, and so has changed nothing.
                emit(Note(text=f"TensorFlow's own XLA does not run this step: {str(error).splitlines()[0]}"))
                self._choice.drop(TF_XLA)
                return step.run(leaves)
        return step.run_in_tensorflow(leaves)

    def _run_graph(self, key: tuple, args: tuple, leaves: Sequence[Any], shapes: Shapes | None) -> Any:
        trace = self._graphs.get(key)
        if trace is None:
            trace, _ = self._traces.of(args, leaves, shapes)
            self._graphs[key] = trace
        result = trace.run(tensors_of(leaves), jit_compile=False)
        self.count_native(1)
        return result

    def _run_refused(self, refused: Refused, step: TracedStep, args: tuple, leaves: Sequence[Any]) -> Any:
        """Lets TensorFlow run a step whose values its kernels may refuse: it raises its own error, or goes on."""
        if self._native_is_graph:
            result = step.run_in_tensorflow(leaves)
            self.count_native(1)
        else:
            result = self.run_native(*args)
        self._refusals += 1
        if self._refusals == _MOST_REFUSALS:
            operation = refused.operation
            self.leave_to_tensorflow(
                CaptureError(
                    f"{_MOST_REFUSALS} times it has had values for {operation.type} ({operation.name}) that TensorFlow "
                    "and XLA do not treat alike, as an index out of range, and TensorFlow had to run the step again",
                    where=line_of(operation),
                    operator=operation.type,
                )
            )
        return result

    def _capture(self, key: tuple, args: tuple, leaves: Sequence[Any], shapes: Shapes | None) -> TracedStep:
        for known, step in list(self._steps.items()):  # the sizes may have come from another iterator
            if known[0][1:] == key[0][1:] and known[1:] == key[1:]:
                trace, _ = self._traces.of(args, leaves, shapes)
                if step.bridged.trace is trace:
                    self._steps[key] = step
                    return step
        # Refused before any work: too many sizes, and inputs whose size XLA cannot know.
        if len(self._steps) >= _MOST_PROGRAMS:
            raise CaptureError(f"its inputs have had {_MOST_PROGRAMS} different shapes; pad them to few")
        sparse = next((leaf for leaf in leaves if isinstance(leaf, tf.SparseTensor | tf.RaggedTensor)), None)
        if sparse is not None:
            raise CaptureError(f"an input is a {type(sparse).__name__}, whose size XLA cannot know; make it dense")
        # Traced as Keras would; an error in the script's own code is told as what it is.
        start_s = time.perf_counter()
        try:
            step = captured(self._traces, self._name, args, leaves, shapes, self._target)
        except (TrainingCompilerError, KeyboardInterrupt):
            raise
        except Exception as error:
            if self._native_is_graph:  # TensorFlow has traced its own function, and so has said it already
                raise
            text = next(iter(str(error).strip().splitlines()), "")
            raise CaptureError(f"tracing it raised {type(error).__name__}: {text[:300]}") from error
        if self._target.strategy.tensor_parallel > 1 and self._tensor_dims is not None:
            step.divide(self._tensor_dims())
        if not all(check.is_fixed for check in step.bridged.trace.checks):
            self._choice.drop(TF_XLA)  # which checks no values, and would train on where the graph raises an error
        statistics().compile_time_s += time.perf_counter() - start_s
        # Compiled where it is XLA's turn; TensorFlow's own engines compile when they are called.
        if self._choice.next == XLA:
            try:
                self._compile(step, args, shapes)
            except jax.errors.JaxRuntimeError as error:
                raise CaptureError(f"XLA could not compile it: {str(error).splitlines()[0][:300]}") from error
        self._explain(key, args, time.perf_counter() - start_s)
        self._steps[key] = step
        if self._typical is None:
            self._typical = key
        return step

    def _compile(self, step: TracedStep, args: tuple, shapes: Shapes | None) -> None:
        """Compiles a step, if that has not been done."""
        try:
            step.compile()
        except NotEnoughMemoryError as error:
            raise with_memory_advice(error, self._called(args, shapes), self._target) from None

    def _explain(self, key: tuple, args: tuple, compile_time_s: float) -> None:
        """Says what made a further program necessary."""
        if not self._steps:
            return
        last = next(reversed(self._steps))
        labels = self._labels_of(args)
        changed = [
            f"{label} {_described(old)} -> {_described(new)}"
            for label, old, new in zip(labels, last[1:], key[1:], strict=False)
            if old != new
        ]
        if last[0][1] != key[0][1]:
            changed = ["the structure of its arguments"]
        elif not changed:
            changed = ["which sizes of its arguments TensorFlow leaves open when it traces the step"]
        emit(
            Recompiled(
                changed=", ".join(changed),
                where=self._where,
                count=len(self._steps) + 1,
                compile_time_s=compile_time_s,
                cure="batch(..., drop_remainder=True), if it is the last, smaller batch of an epoch; "
                "pad to few lengths otherwise",
            )
        )

    def _labels_of(self, args: tuple) -> Sequence[str]:
        return self._labels(*args) if self._labels else [f"input {i}" for i in range(len(tf.nest.flatten(args)))]

    def _fall_back(self, error: CaptureError, args: tuple) -> Any:
        if self._config.fallback == "error":
            self.leave_to_tensorflow(error)
        result = self.run_native(*args)  # an error of the script's own is raised here, in TensorFlow's words
        self.leave_to_tensorflow(error)
        return result


def _signature(leaves: Sequence[Any]) -> tuple:
    return tuple([_kind(leaf) if is_input(leaf) else _constant(leaf) for leaf in leaves])


def _kind(leaf: Any) -> tuple:
    if type(leaf) is EagerTensor:
        return leaf._shape_tuple(), leaf.dtype
    return tuple(leaf.shape), tf.as_dtype(leaf.dtype)


def _structure(item: Any) -> Any:
    """What `tf.nest` walks through, hashable; leaves are None."""
    if isinstance(item, dict):
        return (dict, *sorted(item, key=str), *map(_structure, item.values()))
    if isinstance(item, tuple | list):
        return (type(item), *map(_structure, item))
    return None


def _constant(leaf: Any) -> tuple:
    if isinstance(leaf, bool | int | float | complex | str | bytes | None):
        return (type(leaf), leaf)
    return (type(leaf), id(leaf))


@functools.lru_cache(maxsize=256)
def _described(part: tuple) -> str:
    first, second = part
    return f"{second.name}{list(first)}" if isinstance(first, tuple) else f"{first.__name__} {second!r}"
