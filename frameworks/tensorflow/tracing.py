"""A step as TensorFlow has traced it: once, with the signature that TensorFlow gives it, for batches of many sizes."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.eager.polymorphic_function.concrete_function import ConcreteFunction
from tensorflow.python.framework.func_graph import FuncGraph
from tensorflow.python.framework.ops import EagerTensor
from tensorflow.python.ops.while_v2 import _WhileBodyGradFuncGraph

from trainingcompiler.compiling.gc_pause import gc_paused
from trainingcompiler.errors import CaptureError
from trainingcompiler.frameworks.tensorflow import checks

_SIZES = {"Shape", "Size", "Rank", "TensorListElementShape", "TensorListLength"}


Shapes = tuple[tuple[int | None, ...] | None, ...]
"""The shape of every leaf of a step's arguments as TensorFlow traces it, where it is another than the leaf's own."""


class Trace:
    """One concrete function of a `tf.function`, from which programs of any sizes are exported.

    Python runs in TensorFlow's own tracing, and only there: what is run afterwards is this graph, whoever runs it.

    Attributes:
        concrete: TensorFlow's function.
        checks: What TensorFlow's kernels would refuse of its values; see `checks`.
    """

    def __init__(self, concrete: ConcreteFunction, is_checked: bool):
        """Takes over a concrete function.

        Args:
            concrete: From `Traces`.
            is_checked: Whether TensorFlow's kernels would run it: its own XLA checks no values.
        """
        self.concrete = concrete
        self._is_checked = is_checked
        self.checks: list[checks.Check] = []

    @functools.cached_property
    def exported(self) -> ConcreteFunction:
        """The same function, for XLA: its outputs are followed by one bool for each of the `checks`."""
        graph = self.concrete.graph
        if self._is_checked:
            self.checks = checks.add(graph)
        outputs = list(graph.outputs)
        try:
            graph.outputs.extend(check.holds for check in self.checks)
            return ConcreteFunction.from_func_graph(graph, None, {})
        finally:
            graph.outputs[:] = outputs

    @functools.cached_property
    def _graph(self) -> ConcreteFunction:
        return self._with(jit_compile=False)

    @functools.cached_property
    def _cluster(self) -> ConcreteFunction:
        return self._with(jit_compile=True)

    def run(self, tensors: Sequence[tf.Tensor], jit_compile: bool) -> Any:
        """Lets TensorFlow run the function, by its kernels or by its XLA; returns what the step returns."""
        function = self._cluster if jit_compile else self._graph
        return function._call_flat(list(tensors), function.captured_inputs)

    def _with(self, jit_compile: bool) -> ConcreteFunction:
        """The function with another `jit_compile`; Python does not run for it."""
        own = self.concrete.function_def.attr
        if own["_XlaMustCompile"].b == jit_compile:
            return self.concrete
        attributes = {"_XlaMustCompile": True, "_noinline": True} if jit_compile else {}
        return ConcreteFunction.from_func_graph(self.concrete.graph, self.concrete.function_type, attributes)


class Traces:
    """All that TensorFlow has traced of one step."""

    def __init__(self, trace: Callable[..., ConcreteFunction], is_checked: bool):
        """Traces nothing yet.

        Args:
            trace: Gives a `tf.function`'s concrete function for the arguments of a call, whose tensors are specs.
            is_checked: See `Trace`.
        """
        self._trace, self._is_checked = trace, is_checked
        self._known: dict[int, Trace] = {}

    def of(self, args: tuple, leaves: Sequence[Any], shapes: Shapes | None = None) -> tuple[Trace, bool]:
        """The trace for a call, and whether Python has run for it, which TensorFlow's own cache decides.

        Args:
            args: The arguments, nested.
            leaves: Their leaves.
            shapes: What TensorFlow knows of the leaves' shapes before it has them; None is their own shapes.

        Raises:
            CaptureError: An input is of a kind that XLA does not have.
        """
        specs = [
            _spec(index, leaf, None if shapes is None else shapes[index]) if is_input(leaf) else leaf
            for index, leaf in enumerate(leaves)
        ]
        with gc_paused(), _sizes_in_place():
            concrete = self._trace(*tf.nest.pack_sequence_as(args, specs))
        is_new = id(concrete) not in self._known
        return self._known.setdefault(id(concrete), Trace(concrete, self._is_checked)), is_new


def is_input(leaf: Any) -> bool:
    """Whether an argument of a step is data: an array or a tensor, and not a part of the program."""
    kind = type(leaf)
    if kind is EagerTensor or kind is np.ndarray:  # `isinstance` with `tf.Tensor`, a protocol, takes 20 us
        return True
    return isinstance(leaf, tf.Tensor | np.ndarray | np.generic) and not isinstance(leaf, tf.Variable)


def _spec(index: int, leaf: Any, shape: tuple[int | None, ...] | None) -> tf.TensorSpec:
    dtype = tf.as_dtype(leaf.dtype)
    if dtype == tf.string or dtype in (tf.resource, tf.variant):
        raise CaptureError(f"input {index} is of dtype {dtype.name}, which XLA does not have")
    own = tf.TensorShape(leaf.shape)
    # A plan asks for other sizes than the script's; what is open in the script's signature stays open.
    return tf.TensorSpec(shape if shape is not None and own.is_compatible_with(shape) else own, dtype)


@contextlib.contextmanager
def _sizes_in_place() -> Iterator[None]:
    """Has sizes computed where they are used: XLA has to know them when it compiles, and no value of a list is known.

    TensorFlow's gradient of a loop asks for the shapes of what the loop computed inside the loop, and keeps them in a
    list, unless the function is compiled; what is kept then is the tensor.
    """
    original: Callable = _WhileBodyGradFuncGraph._create_op_internal

    @functools.wraps(original)
    def create(graph: Any, op_type: str, *args: Any, **kwargs: Any) -> Any:
        create_operation = FuncGraph._create_op_internal if op_type in _SIZES else original
        return create_operation(graph, op_type, *args, **kwargs)

    _WhileBodyGradFuncGraph._create_op_internal = create
    try:
        yield
    finally:
        _WhileBodyGradFuncGraph._create_op_internal = original
