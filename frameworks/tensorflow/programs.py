"""Exported steps, compiled and bound to the variables they train."""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tensorflow as tf
from tensorflow.python.framework.ops import EagerTensor

from trainingcompiler.compiling import compiler
from trainingcompiler.errors import CaptureError
from trainingcompiler.frameworks.tensorflow import bridge, state
from trainingcompiler.frameworks.tensorflow.interrupts import uninterrupted
from trainingcompiler.frameworks.tensorflow.tracing import Shapes, Trace, Traces, is_input
from trainingcompiler.program import TensorSpec
from trainingcompiler.reporting.events import phase
from trainingcompiler.reporting.statistics import current as statistics
from trainingcompiler.targets.target import Target


class NothingTrained(CaptureError):
    """A step has been traced, and changes nothing."""


class Refused(Exception):
    """A compiled step has met a value that a kernel of TensorFlow may refuse, and has changed nothing.

    Attributes:
        operation: The first one that may.
    """

    def __init__(self, operation: Any):
        super().__init__(operation.name)
        self.operation = operation


class TracedStep:
    """A step for one signature of its arguments: exported, compiled on first use, and able to run.

    Attributes:
        bridged: What the bridge has exported.
        template: The structure of what the step returns; `pack` fills it.
    """

    def __init__(self, trace: Trace, name: str, leaves: Sequence[Any], target: Target | None = None):
        """Exports the step; none of its Python runs.

        Args:
            trace: What TensorFlow has traced for the signature.
            name: The program's name.
            leaves: The leaves of its arguments: arrays and tensors are inputs, all others are constants.
            target: What it is compiled for; None is one local device.

        Raises:
            CaptureError: It cannot be compiled.
        """
        self._is_input = [is_input(leaf) for leaf in leaves]
        self._target = target
        specs = [tf.TensorSpec(leaf.shape, tf.as_dtype(leaf.dtype)) for leaf in leaves if is_input(leaf)]
        self.bridged = bridge.export(trace, specs, name)
        self.template = trace.concrete.structured_outputs
        self._is_tensor = [item is not None for item in tf.nest.flatten(self.template, expand_composites=True)]
        is_flat = type(self.template) is dict and all(isinstance(item, tf.Tensor) for item in self.template.values())
        self._keys = sorted(self.template) if is_flat else None  # as tf.nest orders them; Keras's steps return dicts
        self._state = [state.state_of(variable) for variable in self.bridged.state]
        self._read = [state.state_of(item) if isinstance(item, tf.Variable) else item for item in self.bridged.inputs]
        self._read = [item if isinstance(item, state.VariableState) else _array(item) for item in self._read]
        if not self._state:
            raise NothingTrained("it assigns no variable, so it trains nothing")
        self._executable: compiler.Executable | None = None
        self._was_checked = False  # by a step whose values nothing has refused

    def divide(self, dims: Mapping[int, int]) -> None:
        """Says along which dims devices that share a layer divide variables; before `compile`.

        Args:
            dims: Identity of a variable -> dim.
        """
        program = self.bridged.program
        batch = len(program.inputs) - len(self.bridged.inputs)

        def divided(specs: Sequence[TensorSpec], variables: Sequence[Any]) -> Iterator[TensorSpec]:
            for spec, variable in zip(specs, variables, strict=True):
                yield dataclasses.replace(spec, tensor_dim=dims.get(id(variable)))

        program = dataclasses.replace(
            program,
            state=tuple(divided(program.state, self.bridged.state)),
            inputs=(*program.inputs[:batch], *divided(program.inputs[batch:], self.bridged.inputs)),
        )
        self.bridged = dataclasses.replace(self.bridged, program=program)

    def compile(self) -> None:
        """Compiles the program for this process's device; without effect the second time."""
        if self._executable is None:
            start_s = time.perf_counter()
            self._executable = compiler.compile(self.bridged.program, self._target)
            statistics().compiles += 1
            statistics().compile_time_s += time.perf_counter() - start_s

    def run(self, leaves: Sequence[Any]) -> Any:
        """Runs the compiled program on arguments of its signature; returns what the step returns.

        Raises:
            Refused: TensorFlow has to run this step; see `checks`.
        """
        self.compile()
        batch = [_array(leaf) for leaf, given in zip(leaves, self._is_input, strict=True) if given]
        with state.lock, jax.enable_x64(True):
            if self._executable.state_shardings is None:
                given = tuple([one.array if one.array is not None else one.take(None) for one in self._state])
                read = [item.take(None) if isinstance(item, state.VariableState) else item for item in self._read]
            else:
                given, read = self._placed(self._executable.state_shardings, self._executable.input_shardings)
            with uninterrupted():
                new_state, outputs = self._executable(given, (*batch, *read))
                for variable, array in zip(self._state, new_state, strict=True):
                    variable.update(array)
            # The batch may be the script's own memory, which it may change when this returns.
            jax.block_until_ready(outputs or new_state)
            for variable in self._state:
                if variable.is_pinned:
                    variable.give_back()
        if self.bridged.trace.checks:
            outputs, sound = outputs[:-1], np.asarray(outputs[-1])
            if not sound.all():
                raise Refused(self.bridged.trace.checks[int(sound.argmin())].operation)
            self._was_checked = True
        return self.pack([state.tensor_of(output) for output in outputs])

    def _placed(self, of_state: tuple, of_inputs: Any) -> tuple[tuple, list]:
        """What the step consumes and reads, besides the batch, on several devices."""
        of_read = of_inputs[len(of_inputs) - len(self._read) :]
        return (
            tuple(variable.take(where) for variable, where in zip(self._state, of_state, strict=True)),
            [i.take(w) if isinstance(i, state.VariableState) else i for i, w in zip(self._read, of_read, strict=True)],
        )

    @property
    def is_sound(self) -> bool:
        """Whether nothing in further values of this signature can be refused, so that nobody has to look."""
        return all(check.is_fixed for check in self.bridged.trace.checks) and (
            self._was_checked or not self.bridged.trace.checks
        )

    def run_in_tensorflow(self, leaves: Sequence[Any], jit_compile: bool = False) -> Any:
        """Lets TensorFlow run the function that was traced, by its kernels or by its XLA."""
        result = self.bridged.trace.run(tensors_of(leaves), jit_compile)
        self._was_checked |= not jit_compile
        return result

    def pack(self, tensors: Sequence[tf.Tensor]) -> Any:
        """Returns what the step returns, given its tensors in order."""
        remaining = iter(tensors)
        values = [next(remaining) if is_tensor else None for is_tensor in self._is_tensor]
        if self._keys is not None:
            logs = dict(zip(self._keys, values, strict=True))
            return {key: logs[key] for key in self.template}
        return tf.nest.pack_sequence_as(self.template, values, expand_composites=True)


def captured(
    traces: Traces,
    name: str,
    args: tuple,
    leaves: Sequence[Any],
    shapes: Shapes | None = None,
    target: Target | None = None,
) -> TracedStep:
    """Traces a step, if TensorFlow has not traced it for such arguments, and exports it for their sizes.

    Args:
        traces: What TensorFlow has traced of the step.
        name: The program's name.
        args: The arguments of one call, nested.
        leaves: Their leaves.
        shapes: See `Traces.of`.
        target: What it is compiled for; None is one local device.

    Raises:
        CaptureError: It cannot be compiled.
    """
    with phase("capture", name) as running:
        trace, is_new = traces.of(args, leaves, shapes)
        operations = f"{len(trace.concrete.graph.get_operations()):,} operations"
        running.detail += f", {operations}" if is_new else f", {operations}, traced before"
        return TracedStep(trace, name, leaves, target)


def tensors_of(leaves: Sequence[Any]) -> list[tf.Tensor]:
    """The inputs among the leaves, as tensors."""
    return [tf.convert_to_tensor(leaf) for leaf in leaves if is_input(leaf)]


def _array(leaf: Any) -> np.ndarray:
    return leaf._numpy() if type(leaf) is EagerTensor else np.asarray(leaf)
