"""What TensorFlow's kernels check in values and XLA's do not: an index out of range, an assertion, a NaN.

XLA clamps such an index, drops the write, or drops the assertion, and trains on. So for every operation of a traced
step whose kernel may refuse a value, its condition is added to the graph that XLA is given. The program computes
whether all of them hold, and undoes itself where one does not; TensorFlow then runs the step, and raises its own error.

A condition that is too strict costs one step of TensorFlow, never a wrong one.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import context
from tensorflow.python.framework import ops
from tensorflow.python.framework.function_def_to_graph import function_def_to_graph
from tensorflow.python.ops.handle_data_util import get_resource_handle_data

from trainingcompiler.errors import CaptureError
from trainingcompiler.frameworks.tensorflow.lines import line_of

_CALLS = {"PartitionedCall", "StatefulPartitionedCall"}
_BRANCHES = {"If", "StatelessIf", "Case", "StatelessCase"}
_LOOPS = {"While", "StatelessWhile"}
_ASSERTIONS = {"Assert", "CheckNumerics", "CheckNumericsV2"}
_SIZES = {"Shape", "ShapeN", "Size", "Rank", "TensorListElementShape", "TensorListLength", "VariableShape"}
_READS = {"ReadVariableOp", "ResourceGather", "ResourceGatherNd", "VarIsInitializedOp", "VariableShape"}

_IS_LOOP = "trainingcompiler_is_loop"

Holds = Callable[[Any, Sequence[tf.Tensor]], list[tf.Tensor]]


@dataclass(frozen=True)
class Check:
    """A condition that a step's values have to fulfil.

    Attributes:
        operation: Whose kernel asks for it; of the step's own graph, so that one in a loop is the loop.
        holds: A bool scalar of the same graph.
        is_fixed: Whether the sizes of the batch decide alone, so that it holds always or never.
    """

    operation: Any
    holds: tf.Tensor
    is_fixed: bool


def add(graph: Any) -> list[Check]:
    """Adds the conditions of everything that a traced step computes to its graph.

    Args:
        graph: The step's, a `FuncGraph`. What it computed before, it computes still.

    Raises:
        CaptureError: A condition depends on what a loop or a branch writes.
    """
    with graph.as_default(), tf.name_scope("checks"):
        try:
            return list(filter(None, map(_added, _live(graph))))
        finally:
            _graph_of.cache_clear()


def _added(operation: Any) -> Check | None:
    """The condition of an operation of the step's own graph, added to it."""
    if not _has_inner(operation):
        holds = _conditions(operation, operation.inputs)
        return Check(operation, _all(holds), _is_fixed(operation)) if holds else None
    try:
        with tf.control_dependencies(list(operation.control_inputs)):
            holds = _conditions(operation, operation.inputs)
    except CaptureError as error:
        error.where = error.where or line_of(operation)
        raise
    if not holds:
        return None
    check = Check(operation, _all(holds), False)
    operation._add_control_input(check.holds.op)  # what is copied may read what the operation then writes
    return check


def _live(graph: Any) -> list[Any]:
    """The operations that TensorFlow runs, in order; what nothing depends on is never asked."""
    waiting = [tensor.op for tensor in graph.outputs if tensor is not None and tensor.graph is graph]
    waiting += graph.control_outputs
    seen: set[Any] = set()
    while waiting:
        operation = waiting.pop()
        if operation not in seen:
            seen.add(operation)
            waiting += [tensor.op for tensor in operation.inputs]
            waiting += operation.control_inputs
    return [operation for operation in graph.get_operations() if operation in seen]


def _conditions(operation: Any, inputs: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """The conditions of an operation on these inputs, as bool tensors of any shape."""
    if operation.type in _CALLS:
        return _inside(_called(operation, "f"), inputs)
    if operation.type in _BRANCHES:
        return _of_branches(operation, inputs)
    if operation.type in _LOOPS:
        return _of_loop(operation, inputs)
    return _CHECKS[operation.type][0](operation, inputs) if _is_check(operation) else []


def _is_check(operation: Any) -> bool:
    """Whether an operation is one whose kernel may refuse a value.

    In a loop, where to ask takes a second loop, it is not where the loop counts by itself.
    """
    if operation.type not in _CHECKS:
        return False
    return not (getattr(operation.graph, _IS_LOOP, False) and _is_fixed(operation))


def _is_fixed(operation: Any) -> bool:
    """Whether sizes, constants, and the count of a loop decide alone about the values that are asked about."""
    _, asks = _CHECKS[operation.type]
    waiting = [operation.inputs[position] for position in asks]
    seen: set[Any] = set()
    while waiting:
        tensor = waiting.pop()
        source = tensor.op
        if source in seen or source.type in _SIZES or _is_count(tensor):
            continue
        if source.type != "Const" and (source.op_def.is_stateful or not source.inputs):
            return False
        seen.add(source)
        waiting += source.inputs
    return True


def _is_count(tensor: tf.Tensor) -> bool:
    """Whether a tensor of a loop's body counts its runs, or is such a number that its gradient has kept."""
    graph = tensor.graph
    if not getattr(graph, _IS_LOOP, False):
        return False
    if tensor.op.type == "TensorListPopBack":
        return tensor.dtype.is_integer
    place = next((index for index, argument in enumerate(graph.inputs) if argument is tensor), None)
    if place is None:
        return False
    following = graph.outputs[place].op
    while following.type == "Identity":
        following = following.inputs[0].op
    sources = {one.op.type for one in following.inputs if one is not tensor}
    return (
        following.type in ("AddV2", "Add", "Sub")
        and tensor.op in {i.op for i in following.inputs}
        and sources == {"Const"}
    )


# Conditions of nested graphs: computed anew beside the operation, by copies of what they depend on.


def _has_inner(operation: Any) -> bool:
    return operation.type in _CALLS | _BRANCHES | _LOOPS


def _called(operation: Any, attribute: str) -> Any:
    return _graph_of(operation.node_def.attr[attribute].func.name)


@functools.lru_cache(maxsize=512)
def _graph_of(name: str) -> Any:
    """The graph of a function that an operation calls."""
    definition = context.context().get_function_def(name)
    graph = function_def_to_graph(definition)
    graph.control_outputs = [graph.get_operation_by_name(node) for node in definition.control_ret.values()]
    return graph


def _inner_graphs(operation: Any) -> list[Any]:
    if operation.type in _CALLS:
        return [_called(operation, "f")]
    if operation.type in ("If", "StatelessIf"):
        return [_called(operation, "else_branch"), _called(operation, "then_branch")]
    if operation.type in ("Case", "StatelessCase"):
        names = [branch.name for branch in operation.node_def.attr["branches"].list.func]
        return [_graph_of(name) for name in names]
    if operation.type in _LOOPS:
        condition, body = _called(operation, "cond"), _called(operation, "body")
        setattr(body, _IS_LOOP, True)
        return [condition, body]
    return []


def _is_checked(graph: Any) -> bool:
    """Whether a nested graph has an operation with a condition, however deep."""
    return any(_is_check(operation) or any(map(_is_checked, _inner_graphs(operation))) for operation in _live(graph))


def _inside(graph: Any, inputs: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """The conditions in a nested graph, given the values of its arguments."""
    if not _is_checked(graph):
        return []
    copied = _Copied(graph.inputs, inputs)
    found = []
    for operation in _live(graph):
        if _is_check(operation) or any(map(_is_checked, _inner_graphs(operation))):
            found += _conditions(operation, [copied.value(tensor) for tensor in operation.inputs])
    return found


class _Copied:
    """Values of a nested graph's tensors, computed in the graph that is being built."""

    def __init__(self, tensors: Sequence[tf.Tensor], values: Sequence[tf.Tensor]):
        self._values = {tensor.ref(): value for tensor, value in zip(tensors, values, strict=True)}

    def value(self, tensor: tf.Tensor) -> tf.Tensor:
        """The tensor's value; what it depends on is copied once."""
        waiting = [tensor.op]
        while waiting:
            operation = waiting[-1]
            missing = [one.op for one in operation.inputs if one.ref() not in self._values]
            if all(output.ref() in self._values for output in operation.outputs):
                waiting.pop()
            elif missing:
                waiting += missing
            else:
                self._copy(operation)
                waiting.pop()
        return self._values[tensor.ref()]

    def _copy(self, operation: Any) -> None:
        if _writes(operation) or any(map(_writes, operation.control_inputs)) and operation.type in _READS:
            raise _refusal(operation)
        graph: Any = ops.get_default_graph()
        attributes = operation.node_def.attr
        copy = graph._create_op_internal(
            operation.type,
            [self._values[tensor.ref()] for tensor in operation.inputs],
            [output.dtype for output in operation.outputs],
            name=operation.name,
            attrs={name: value for name, value in attributes.items() if not name.startswith("_")},
            op_def=operation.op_def,
        )
        for output, value in zip(operation.outputs, copy.outputs, strict=True):
            self._values[output.ref()] = value


def _writes(operation: Any) -> bool:
    """Whether an operation does more than compute, and so must not be done twice."""
    inner = _inner_graphs(operation)
    if inner:
        return any(_writes(one) for graph in inner for one in _live(graph))
    return bool(operation.op_def.is_stateful) and operation.type not in _READS | _ASSERTIONS


def _refusal(operation: Any) -> CaptureError:
    return CaptureError(
        f"a value that TensorFlow checks inside a loop, a branch or a tf.function depends on {operation.type} "
        f"({operation.name}), which a second computation of it would do twice; make the check outside",
        operator=operation.type,
    )


def _of_branches(operation: Any, inputs: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    which, *given = inputs
    graphs = _inner_graphs(operation)
    if not any(map(_is_checked, graphs)):
        return []
    branches = [lambda graph=graph: _all(_inside(graph, given)) for graph in graphs]
    if "branches" in operation.node_def.attr:
        return [tf.switch_case(which, branches)]
    no, yes = branches
    return [tf.cond(which, yes, no)]


def _of_loop(operation: Any, inputs: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    condition, body = graphs = _inner_graphs(operation)
    if not any(map(_is_checked, graphs)):
        return []
    for graph in graphs:
        for inner in filter(_writes, _live(graph)):
            raise _refusal(inner)
    varying = [index for index, tensor in enumerate(inputs) if tensor.dtype != tf.resource]

    def all_of(values: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        return [given if index not in at else values[at[index]] for index, given in enumerate(inputs)]

    def goes_on(_: tf.Tensor, *values: tf.Tensor) -> tf.Tensor:
        return _Copied(condition.inputs, all_of(values)).value(condition.outputs[0])

    def once(holds: tf.Tensor, *values: tf.Tensor) -> list[tf.Tensor]:
        given = all_of(values)
        copied = _Copied(body.inputs, given)
        holds = _all([holds, *_inside(condition, given), *_inside(body, given)])
        return [holds, *(copied.value(body.outputs[index]) for index in varying)]

    at = {index: place for place, index in enumerate(varying)}
    start = [inputs[index] for index in varying]
    shapes = [tf.TensorShape([]), *(operation.outputs[index].shape for index in varying)]
    holds, *last = tf.while_loop(goes_on, once, [tf.constant(True), *start], shape_invariants=shapes)
    return [holds, *_inside(condition, all_of(last))]


def _all(holds: Sequence[tf.Tensor]) -> tf.Tensor:
    if not holds:
        return tf.constant(True)
    whole = [tf.reduce_all(one) for one in holds]
    return whole[0] if len(whole) == 1 else tf.reduce_all(tf.stack(whole))


# The table: what each kernel asks of its inputs.

_CHECKS: dict[str, tuple[Holds, tuple[int, ...]]] = {}
"""By type of operation: the condition, and which of its inputs have the values that it is about."""


def _of(*types: str, asks: tuple[int, ...]) -> Callable[[Holds], Holds]:
    def register(check: Holds) -> Holds:
        _CHECKS.update(dict.fromkeys(types, (check, asks)))
        return check

    return register


def _between(values: tf.Tensor, size: tf.Tensor | int, lowest: int = 0) -> list[tf.Tensor]:
    """`lowest <= values < size`; nothing to ask where both are known."""
    known, limit = tf.get_static_value(values), tf.get_static_value(size)
    if known is not None and limit is not None and ((known >= lowest) & (known < limit)).all():
        return []
    values, size = tf.cast(values, tf.int64), tf.cast(size, tf.int64)
    return [(values >= lowest) & (values < size)]


def _shape(tensor: tf.Tensor) -> tf.TensorShape:
    """The static shape of a tensor, or of the variable that a resource is."""
    if tensor.dtype != tf.resource:
        return tensor.shape
    data = get_resource_handle_data(tensor)
    return tf.TensorShape(data.shape_and_type[0].shape if data and data.is_set else None)


def _sizes(tensor: tf.Tensor) -> tf.Tensor:
    """The shape of a tensor, or of the variable that a resource is, as a tensor."""
    shape = _shape(tensor)
    if shape.is_fully_defined():
        return tf.constant(shape.as_list(), tf.int64)
    if tensor.dtype == tf.resource:
        return tf.raw_ops.VariableShape(input=tensor, out_type=tf.int64)
    return tf.shape(tensor, out_type=tf.int64)


def _size(tensor: tf.Tensor, dim: int) -> tf.Tensor | int:
    """One size: a number where it is known."""
    shape = _shape(tensor)
    known = None if shape.rank is None else shape[dim]
    return _sizes(tensor)[dim] if known is None else known


@_of("Assert", asks=(0,))
def _assertion(operation: Any, inputs: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    return [inputs[0]]


@_of("CheckNumerics", "CheckNumericsV2", asks=(0,))
def _finite_input(operation: Any, inputs: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    return [tf.math.is_finite(inputs[0])]


@_of("Gather", "GatherV2", asks=(1,))
def _gather(operation: Any, inputs: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    data, indices, *axis = inputs
    dim = tf.get_static_value(axis[0]) if axis else 0
    return _between(indices, tf.gather(_sizes(data), axis[0]) if dim is None else _size(data, int(dim)))


@_of("ResourceGather", asks=(1,))
def _gather_of_variable(operation: Any, inputs: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    return _between(inputs[1], _size(inputs[0], operation.get_attr("batch_dims")))


@_of(
    "GatherNd", "ResourceGatherNd", "ResourceScatterNdUpdate", "ResourceScatterNdAdd", "ResourceScatterNdSub", asks=(1,)
)
@_of(
    "ResourceScatterNdMax",
    "ResourceScatterNdMin",
    "TensorScatterUpdate",
    "TensorScatterAdd",
    "TensorScatterSub",
    asks=(1,),
)
@_of("TensorScatterMax", "TensorScatterMin", asks=(1,))
def _points(operation: Any, inputs: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    data, indices = inputs[:2]
    return _between(indices, _sizes(data)[: tf.shape(indices)[-1]])


@_of("ScatterNd", asks=(0,))
def _points_of_shape(operation: Any, inputs: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    indices, _, shape = inputs
    return _between(indices, shape[: tf.shape(indices)[-1]])


@_of(
    "ResourceScatterUpdate",
    "ResourceScatterAdd",
    "ResourceScatterSub",
    "ResourceScatterMul",
    "ResourceScatterDiv",
    asks=(1,),
)
@_of("ResourceScatterMax", "ResourceScatterMin", asks=(1,))
def _rows(operation: Any, inputs: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    return _between(inputs[1], _size(inputs[0], 0))


@_of("SparseSoftmaxCrossEntropyWithLogits", asks=(1,))
def _labels(operation: Any, inputs: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    logits, labels = inputs
    return _between(labels, _size(logits, -1))


@_of("InTopK", "InTopKV2", asks=(1,))
def _targets(operation: Any, inputs: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    predictions, targets = inputs[:2]
    return _between(targets, _size(predictions, -1))


@_of("UnsortedSegmentSum", "UnsortedSegmentProd", "UnsortedSegmentMax", "UnsortedSegmentMin", asks=(1,))
def _segments(operation: Any, inputs: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    _, segments, count = inputs
    return [tf.cast(segments, tf.int64) < tf.cast(count, tf.int64)]  # those below 0 are left out, by both


@_of("DynamicPartition", asks=(1,))
def _partitions(operation: Any, inputs: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    return _between(inputs[1], operation.get_attr("num_partitions"))


@_of("InvertPermutation", asks=(0,))
def _permutation(operation: Any, inputs: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    (order,) = inputs
    if tf.get_static_value(order) is not None:
        return []  # XLA checks what it knows
    return [tf.equal(tf.sort(order), tf.range(tf.size(order, order.dtype)))]


@_of("ReverseSequence", asks=(1,))
def _lengths(operation: Any, inputs: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    data, lengths = inputs
    return _between(lengths, _size(data, operation.get_attr("seq_dim")) + 1)


@_of("Bincount", "DenseBincount", asks=(0,))
def _counted(operation: Any, inputs: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    return [inputs[0] >= 0]


@_of("Slice", asks=(1, 2))
def _slice(operation: Any, inputs: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    data, begin, size = inputs
    if tf.get_static_value(begin) is not None:
        return []  # XLA checks what it knows
    begin, size = tf.cast(begin, tf.int64), tf.cast(size, tf.int64)
    return [(begin >= 0) & (begin + tf.maximum(size, 0) <= _sizes(data))]


@_of("StridedSlice", "StridedSliceGrad", "ResourceStridedSliceAssign", "TensorStridedSliceUpdate", asks=(1,))
def _index(operation: Any, inputs: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    data, begin = inputs[:2]
    single, skipped = operation.get_attr("shrink_axis_mask"), operation.get_attr("ellipsis_mask")
    if not single or tf.get_static_value(begin) is not None:
        return []
    shape = tf.cast(data, tf.int64) if operation.type == "StridedSliceGrad" else _sizes(data)
    begin = tf.cast(begin, tf.int64)
    if skipped or operation.get_attr("new_axis_mask"):
        raise CaptureError(
            f"an index of {operation.type} ({operation.name}) is a tensor beside '...' or a new axis, and XLA would "
            "not check it; index in two steps",
            operator=operation.type,
        )
    found = []
    for place in range(begin.shape[0] or 0):
        if single >> place & 1:
            found += _between(begin[place], shape[place], -shape[place])
    return found


@_of("FloorDiv", "FloorMod", "Div", "Mod", "TruncateDiv", "TruncateMod", asks=(1,))
def _divisor(operation: Any, inputs: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    divisor = inputs[1]
    known = tf.get_static_value(divisor)
    if not divisor.dtype.is_integer or known is not None and (known != 0).all():
        return []
    return [tf.not_equal(divisor, 0)]


@_of("Pow", asks=(1,))
def _exponent(operation: Any, inputs: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    exponent = inputs[1]
    return [exponent >= 0] if exponent.dtype.is_integer else []


@_of("StatelessRandomUniformInt", "StatelessRandomUniformIntV2", asks=(-2, -1))
def _range_of_draw(operation: Any, inputs: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    return [inputs[-2] < inputs[-1]]


@_of("TensorListGetItem", "TensorListSetItem", asks=(1,))
def _element(operation: Any, inputs: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    return _between(inputs[1], tf.raw_ops.TensorListLength(input_handle=inputs[0]))


@_of("MatrixInverse", "MatrixSolve", "SelfAdjointEigV2", asks=(0,))
def _finite_result(operation: Any, inputs: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """A matrix that a kernel refuses gives XLA values that are not finite."""
    result = operation.outputs[0]
    if inputs[0] is not operation.inputs[0]:
        result = _Copied(operation.inputs, inputs).value(result)
    return [tf.math.is_finite(tf.abs(result) if result.dtype.is_complex else result)]
