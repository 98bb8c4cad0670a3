"""TensorFlow's own bridge to XLA: a step that assigns variables, as StableHLO with its state named.

`tf.function.experimental_get_compiler_ir` is documented as a tool for debugging, so `check_version` asks for what we
use of it, and what it returns is checked against what the function's graph says.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tensorflow as tf
from jax import lax
from jaxlib.mlir import ir
from tensorflow.python.eager import context
from tensorflow.python.eager.polymorphic_function.compiler_ir import maybe_get_device_name

from trainingcompiler.cache.executables import digest_of_code
from trainingcompiler.errors import CaptureError, TrainingCompilerError
from trainingcompiler.frameworks.tensorflow import stablehlo
from trainingcompiler.frameworks.tensorflow.lines import line_of
from trainingcompiler.frameworks.tensorflow.tracing import Trace
from trainingcompiler.program import StepProgram, TensorSpec

KNOWN_VERSIONS = ((2, 20), (2, 21))  # lowest and highest that the tests have passed with
_STATEFUL_RANDOM = {"RandomUniform", "RandomStandardNormal", "RandomUniformInt", "TruncatedNormal", "RandomShuffle"}
_STATEFUL_RANDOM |= {"Multinomial", "RandomGamma", "RandomPoisson", "RandomPoissonV2", "ParameterizedTruncatedNormal"}


def check_version() -> str:
    """Returns what is worth saying about the installed TensorFlow, or "".

    Raises:
        TrainingCompilerError: It lacks the bridge.
    """
    if not hasattr(tf.function(lambda: None), "experimental_get_compiler_ir"):
        raise TrainingCompilerError(
            f"TensorFlow {tf.__version__} has no tf.function.experimental_get_compiler_ir, through which its steps are "
            f"compiled. Install tensorflow=={'.'.join(map(str, KNOWN_VERSIONS[-1]))}, or run with --engine=tensorflow."
        )
    version = tuple(int(part) for part in tf.__version__.split(".")[:2])
    lowest, highest = KNOWN_VERSIONS
    if lowest <= version <= highest:
        return ""
    return (
        f"TensorFlow {tf.__version__} is not one that the bridge to XLA has been tested with "
        f"({lowest[0]}.{lowest[1]} to {highest[0]}.{highest[1]}); a step that it cannot export runs in TensorFlow"
    )


@dataclass(frozen=True, kw_only=True)
class BridgedStep:
    """One step for one signature, exported.

    Attributes:
        program: The step as a pure function. Where the trace has checks, its last output says which of them hold, and
            where one does not, the new state is the old one.
        trace: TensorFlow's own function of the same step, which its engines can run.
        state: The variables that the step writes, in the program's order.
        inputs: What it only reads besides the batch, in the program's order: variables, and plain tensors that
            the function has closed over.
    """

    program: StepProgram
    trace: Trace
    state: tuple[tf.Variable, ...]
    inputs: tuple[Any, ...]


def export(trace: Trace, specs: Sequence[tf.TensorSpec], name: str) -> BridgedStep:
    """Has TensorFlow translate a traced step, for a batch of these sizes; no Python of the step runs.

    Args:
        trace: The step; takes one tensor per spec.
        specs: Static shapes and dtypes of the batch's tensors.
        name: The program's name.

    Returns:
        The program; its inputs are the batch's tensors, then what `BridgedStep.inputs` says.

    Raises:
        CaptureError: The step cannot be a program of XLA; the operation and its line are named.
    """
    concrete = trace.concrete
    _refuse_stateful_random(concrete)
    variables = {id(variable.handle): variable for variable in concrete.graph.variables}
    captured = [variables.get(id(tensor), tensor) for tensor in concrete.captured_inputs]
    _refuse_resources(concrete, captured, len(specs))
    try:
        text = _stablehlo(trace.exported, specs)
    except (tf.errors.OpError, ValueError, TypeError) as error:
        raise _explained(error, concrete) from error
    try:
        described = stablehlo.described(text)
    except ir.MLIRError as error:
        raise _unreadable(error, concrete) from error
    parameters = [*specs, *captured]
    outputs = concrete.outputs
    count = len(outputs) + len(trace.checks)
    written = [described.aliases[position] for position in sorted(described.aliases)]
    assert sorted(described.aliases) == list(range(count, count + len(written))), "the bridge's outputs are not ours"
    for tensor, shape in zip(outputs, described.shapes, strict=False):
        if shape is None:
            raise CaptureError(
                f"the shape of an output, {tensor.name} {tensor.shape}, is not known before the step runs",
                where=line_of(tensor.op),
                operator=tensor.op.type,
            )
    return BridgedStep(
        program=_program(text, described, name, parameters, outputs, written, len(specs)),
        trace=trace,
        state=tuple(parameters[index] for index in written),
        inputs=tuple(parameters[i] for i in range(len(specs), len(parameters)) if i not in set(written)),
    )


def _stablehlo(function: Any, specs: Sequence[tf.TensorSpec]) -> bytes:
    """What `experimental_get_compiler_ir` does once it has a concrete function, whose own shapes may be open."""
    context.ensure_initialized()
    return context.context().get_compiler_ir(
        device_name=maybe_get_device_name(None),
        platform_name="CPU",
        function_name=function.name,
        flat_args=list(specs),
        captured_inputs=function.captured_inputs,
        stage="stablehlo_serialized",
    )


def _program(
    text: bytes,
    described: stablehlo.Described,
    name: str,
    parameters: Sequence[Any],
    outputs: Sequence[Any],
    written: Sequence[int],
    batch: int,
) -> StepProgram:
    specs = [_spec(item, index < batch) for index, item in enumerate(parameters)]
    dtypes = [np.dtype(tensor.dtype.as_numpy_dtype) for tensor in outputs]
    output_specs = [
        TensorSpec(name=f"output {index}", shape=shape, dtype=dtype, role="output")
        for index, (shape, dtype) in enumerate(zip(described.shapes, dtypes, strict=False))
    ]
    state = [specs[index] for index in written]
    checks = len(described.shapes) - len(outputs) - len(state)
    read = [index for index in range(len(parameters)) if index not in set(written)]
    flags = [
        TensorSpec(name=f"check {index}", shape=(), dtype=np.dtype(bool), role="output") for index in range(checks)
    ]
    results = tuple((spec.shape, spec.dtype) for spec in (*output_specs, *flags, *state))
    module = stablehlo.Module(name=name, text=text, results=results)

    def step(state: tuple, inputs: tuple) -> tuple[tuple, tuple]:
        given = dict(zip(written, state, strict=True)) | dict(zip(read, inputs, strict=True))
        returned = stablehlo.call(module, tuple(given[index] for index in range(len(parameters))))
        plain, flags = returned[: len(outputs)], returned[len(outputs) : len(outputs) + checks]
        new_state = returned[len(outputs) + checks :]
        if not checks:
            return new_state, plain
        is_sound = jnp.all(jnp.stack(flags))
        kept = tuple(lax.select(is_sound, new, old) for new, old in zip(new_state, state, strict=True))
        return kept, (*plain, jnp.stack(flags))

    holds = TensorSpec(name="which checks hold", shape=(checks,), dtype=np.dtype(bool), role="output")
    key = f"{digest_of_code(Path(__file__).parent)} {list(written)} {described.digest}"
    return StepProgram(
        name=name,
        function=step,
        state=tuple(state),
        inputs=tuple(specs[index] for index in read),
        outputs=(*output_specs, holds) if checks else tuple(output_specs),
        digest=hashlib.sha256(key.encode()).hexdigest(),
    )


def _spec(item: Any, in_batch: bool) -> TensorSpec:
    if isinstance(item, tf.Variable):
        return _tensor_spec(item.name.removesuffix(":0"), item, "parameter" if item.trainable else "buffer")
    if in_batch:
        return _tensor_spec(item.name or "input", item, "batch")
    return _tensor_spec("constant", item, "constant")


def _tensor_spec(name: str, tensor: Any, role: Any) -> TensorSpec:
    if not tensor.shape.is_fully_defined():
        raise CaptureError(f"the shape of {name}, {tensor.shape}, is not known before the step runs")
    return TensorSpec(
        name=name, shape=tuple(tensor.shape.as_list()), dtype=np.dtype(tensor.dtype.as_numpy_dtype), role=role
    )


def _refuse_stateful_random(concrete: Any) -> None:
    """XLA would draw these from a state of its own, which no seed of TensorFlow reaches."""
    for operation in _operations(concrete.graph):
        if operation.type in _STATEFUL_RANDOM:
            raise CaptureError(
                f"{operation.type} draws from TensorFlow's global generator, which a program of XLA does not have; "
                "keras.random with a SeedGenerator, tf.random.Generator and tf.random.stateless_* can be compiled",
                where=line_of(operation),
                operator=operation.type,
            )


def _operations(graph: Any) -> list[Any]:
    """The operations of a function's graph and of the functions that it calls."""
    found, seen, waiting = [], set(), [graph]
    while waiting:
        current = waiting.pop()
        for operation in current.get_operations():
            found.append(operation)
            for attribute in operation.node_def.attr.values():
                names = [attribute.func.name, *(called.name for called in attribute.list.func)]
                for name in filter(None, names):
                    inner = graph._get_function(name)
                    if name not in seen and getattr(inner, "graph", None) is not None:
                        seen.add(name)
                        waiting.append(inner.graph)
    return found


def _refuse_resources(concrete: Any, captured: Sequence[Any], batch: int) -> None:
    """What holds values and is no variable: a table, a queue, an iterator."""
    for placeholder, item in zip(concrete.inputs[batch:], captured, strict=True):
        if isinstance(item, tf.Variable) or item.dtype not in (tf.resource, tf.variant):
            continue
        readers = placeholder.consumers()
        used = f"{readers[0].type} ({readers[0].name}) reads" if readers else "it reads"
        raise CaptureError(
            f"{used} a resource that is no variable, such as a table, a queue or a dataset iterator, which a program "
            "of XLA does not have",
            where=line_of(readers[0]) if readers else None,
            operator=readers[0].type if readers else None,
        )


_UNSUPPORTED = re.compile(
    r"(?P<type>\w+) \(No registered '\w+' OpKernel for XLA_CPU_JIT[^\n]*?\{\{node (?P<node>[^}]+)\}\}"
)
_NODE = re.compile(r"\{\{node (?P<node>[^}]+)\}\}")
_STACK = re.compile(
    r"\*\*\* Begin (?:stack trace|debug stack trace).*?(?:\*\*\* End (?:debug )?stack trace \*\*\*|\Z)", re.S
)


def _explained(error: Exception, concrete: Any) -> CaptureError:
    text = _STACK.sub("", str(getattr(error, "message", error)))
    operations = {operation.name: operation for operation in _operations(concrete.graph)}
    found = _UNSUPPORTED.search(text)
    if found is not None:
        operation = operations.get(found["node"])
        reason = f"XLA has no kernel for {found['type']} ({found['node']})"
        return CaptureError(reason, where=line_of(operation), operator=operation.type if operation else found["type"])
    operation = next(filter(None, (operations.get(node["node"]) for node in _NODE.finditer(text))), None)
    first = next((line for line in text.splitlines() if line.strip()), type(error).__name__)
    named = f"{operation.type} ({operation.name})" if operation is not None else "it"
    return CaptureError(
        f"TensorFlow could not translate {named}: {first.strip()[:300]}",
        where=line_of(operation),
        operator=operation.type if operation is not None else None,
    )


_QUOTED = re.compile(r'"(?P<node>[^"]+)"')


def _unreadable(error: ir.MLIRError, concrete: Any) -> CaptureError:
    """What TensorFlow has written is no sound program; its diagnostics know the operation."""
    operations = {operation.name: operation for operation in _operations(concrete.graph)}
    first = error.error_diagnostics[0] if error.error_diagnostics else None
    quoted = _QUOTED.finditer(str(first.location)) if first is not None else ()
    operation = next(filter(None, (operations.get(node["node"]) for node in quoted)), None)
    named = f"{operation.type} ({operation.name})" if operation is not None else "an operation"
    reason = first.message if first is not None else str(error).splitlines()[0]
    return CaptureError(
        f"TensorFlow translated {named} into what XLA does not accept: {reason[:300]}",
        where=line_of(operation),
        operator=operation.type if operation is not None else None,
    )
