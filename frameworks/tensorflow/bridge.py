"""TensorFlow's own bridge to XLA: a step that assigns variables, as StableHLO with its state named.

`tf.function.experimental_get_compiler_ir` is documented as a tool for debugging, so `check_version` asks for what we
use of it, and what it returns is checked against what the function's graph says.
"""

import functools
import hashlib
import os
import re
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from trainingcompiler.errors import CaptureError, TrainingCompilerError
from trainingcompiler.frameworks.tensorflow import stablehlo
from trainingcompiler.program import StepProgram, TensorSpec
from trainingcompiler.store import digest_of_code

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
        program: The step as a pure function.
        concrete: TensorFlow's own function of the same step, which its engine can run.
        state: The variables that the step writes, in the program's order.
        inputs: What it only reads besides the batch, in the program's order: variables, and plain tensors that
            the function has closed over.
    """

    program: StepProgram
    concrete: Any
    state: tuple[tf.Variable, ...]
    inputs: tuple[Any, ...]


def export(function: Any, specs: Sequence[tf.TensorSpec], name: str) -> BridgedStep:
    """Traces a step, and has TensorFlow translate it.

    Args:
        function: A `tf.function` made with `jit_compile=True`; takes one tensor per spec, returns a flat list of
            tensors.
        specs: Static shapes and dtypes of the batch's tensors.
        name: The program's name.

    Returns:
        The program; its inputs are the batch's tensors, then what `BridgedStep.inputs` says.

    Raises:
        CaptureError: The step cannot be a program of XLA; the operation and its line are named.
    """
    concrete = function.get_concrete_function(*specs)
    _refuse_stateful_random(concrete)
    try:
        text = function.experimental_get_compiler_ir(*specs)(stage="stablehlo_serialized", platform_name="CPU")
    except (tf.errors.OpError, ValueError, TypeError) as error:
        raise _explained(error, concrete) from error
    variables = {id(variable.handle): variable for variable in concrete.graph.variables}
    captured = [variables.get(id(tensor), tensor) for tensor in concrete.captured_inputs]
    for item in captured:
        if not isinstance(item, tf.Variable) and item.dtype in (tf.resource, tf.variant):
            raise CaptureError("it uses a resource that is no variable, such as a table, a queue or a dataset iterator")
    parameters = [*specs, *captured]
    outputs = [tensor for tensor in concrete.outputs if tensor is not None]
    replaced = stablehlo.aliases(text)
    written = [replaced[position] for position in sorted(replaced)]
    assert sorted(replaced) == list(range(len(outputs), len(outputs) + len(written))), (
        "the bridge's outputs are not ours"
    )
    return BridgedStep(
        program=_program(text, name, parameters, outputs, written, len(specs)),
        concrete=concrete,
        state=tuple(parameters[index] for index in written),
        inputs=tuple(parameters[i] for i in range(len(specs), len(parameters)) if i not in set(written)),
    )


def _program(
    text: bytes, name: str, parameters: Sequence[Any], outputs: Sequence[Any], written: Sequence[int], batch: int
) -> StepProgram:
    specs = [_spec(item, index < batch) for index, item in enumerate(parameters)]
    output_specs = [_tensor_spec(f"output {index}", tensor, "output") for index, tensor in enumerate(outputs)]
    state = [specs[index] for index in written]
    read = [index for index in range(len(parameters)) if index not in set(written)]
    results = tuple((spec.shape, spec.dtype) for spec in (*output_specs, *state))
    module = stablehlo.Module(name=name, text=text, results=results)

    def step(state: tuple, inputs: tuple) -> tuple[tuple, tuple]:
        given = dict(zip(written, state, strict=True)) | dict(zip(read, inputs, strict=True))
        returned = stablehlo.call(module, tuple(given[index] for index in range(len(parameters))))
        return returned[len(outputs) :], returned[: len(outputs)]

    return StepProgram(
        name=name,
        function=step,
        state=tuple(state),
        inputs=tuple(specs[index] for index in read),
        outputs=tuple(output_specs),
        digest=hashlib.sha256(f"{digest_of_code(Path(__file__).parent)} {list(written)} ".encode() + text).hexdigest(),
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
                where=_line(operation),
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


_UNSUPPORTED = re.compile(
    r"(?P<type>\w+) \(No registered '\w+' OpKernel for XLA_CPU_JIT[^\n]*?\{\{node (?P<node>[^}]+)\}\}"
)
_NODE = re.compile(r"\{\{node (?P<node>[^}]+)\}\}")


def _explained(error: Exception, concrete: Any) -> CaptureError:
    text = str(getattr(error, "message", error))
    operations = {operation.name: operation for operation in _operations(concrete.graph)}
    found = _UNSUPPORTED.search(text) or _NODE.search(text)
    node = found["node"] if found else ""
    operation = operations.get(node)
    kind = operation.type if operation is not None else (found.groupdict().get("type") if found else None)
    if found is not None and found.re is _UNSUPPORTED:
        reason = f"XLA has no kernel for {found['type']} ({node})"
    else:
        first = next((line for line in text.splitlines() if line.strip()), type(error).__name__)
        reason = f"TensorFlow could not translate it: {first.strip()[:300]}"
    return CaptureError(reason, where=_line(operation) if operation is not None else None, operator=kind)


def _line(operation: Any) -> str | None:
    """The innermost line of the traceback that is the script's own: of no package, and of neither Python nor us."""
    for frame in reversed(operation.traceback or ()):
        if not frame.filename.startswith(("<", *_foreign_folders())):
            return f"{os.path.basename(frame.filename)}:{frame.lineno}"
    return None


@functools.cache
def _foreign_folders() -> tuple[str, ...]:
    ours = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    packages = [os.path.dirname(os.path.dirname(tf.__file__)), sysconfig.get_paths()["stdlib"]]
    return (ours, *packages)
