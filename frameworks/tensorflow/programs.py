"""Exported steps, compiled and bound to the variables they train."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tensorflow as tf
from tensorflow.python.framework.ops import EagerTensor

from trainingcompiler import compiler
from trainingcompiler.errors import CaptureError
from trainingcompiler.events import phase
from trainingcompiler.frameworks.tensorflow import bridge, state
from trainingcompiler.frameworks.tensorflow.interrupts import uninterrupted
from trainingcompiler.garbage import collector_at_rest
from trainingcompiler.program import TensorSpec
from trainingcompiler.statistics import current as statistics
from trainingcompiler.targets import Target


class NothingTrained(CaptureError):
    """A step has been traced, and changes nothing."""


class TracedStep:
    """A step for one signature of its arguments: exported, compiled on first use, and able to run.

    Attributes:
        bridged: What the bridge has exported.
        template: The structure of what the step returns; `pack` fills it.
    """

    def __init__(
        self,
        function: Callable,
        name: str,
        args: Any,
        leaves: Sequence[Any],
        autograph: bool,
        target: Target | None = None,
    ):
        """Traces the step.

        Args:
            function: Takes the arguments as `args` is structured; assigns variables.
            name: The program's name.
            args: The arguments of one call.
            leaves: Its leaves: arrays and tensors become inputs, all others are constants.
            autograph: Whether Python's control flow is converted.
            target: What it is compiled for; None is one local device.

        Raises:
            CaptureError: It cannot be compiled.
        """
        self._is_input = [is_input(leaf) for leaf in leaves]
        self._constants = [None if given else leaf for leaf, given in zip(leaves, self._is_input, strict=True)]
        self._args = args
        self._function = function
        self._target = target
        self.template: Any = None
        self._keys: list | None = None  # in tf.nest's order, where the step returns a dict of tensors, as Keras's do
        self._results: list[Any] = []
        traced = tf.function(self._flat, jit_compile=True, autograph=autograph)
        specs = [_spec(index, leaf) for index, leaf in enumerate(leaves) if is_input(leaf)]
        with phase("capture", name) as running, collector_at_rest():
            self.bridged = bridge.export(traced, specs, name)
            running.detail += f", {len(self.bridged.concrete.graph.get_operations()):,} operations"
        self._state = [state.cell_of(variable) for variable in self.bridged.state]
        self._read = [state.cell_of(item) if isinstance(item, tf.Variable) else item for item in self.bridged.inputs]
        self._read = [item if isinstance(item, state.Cell) else _array(item) for item in self._read]
        if not self._state:
            raise NothingTrained("it assigns no variable, so it trains nothing")
        self._executable: compiler.Executable | None = None

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
        """Runs the compiled program on arguments of the signature it was traced for; returns what the step returns."""
        self.compile()
        batch = [_array(leaf) for leaf, given in zip(leaves, self._is_input, strict=True) if given]
        with state.lock, jax.enable_x64(True):
            if self._executable.state_shardings is None:
                given = tuple([cell.array if cell.array is not None else cell.take(None) for cell in self._state])
                read = [item.take(None) if isinstance(item, state.Cell) else item for item in self._read]
            else:
                given, read = self._placed(self._executable.state_shardings, self._executable.input_shardings)
            with uninterrupted():
                new_state, outputs = self._executable(given, (*batch, *read))
                for cell, array in zip(self._state, new_state, strict=True):
                    cell.update(array)
            # The batch may be the script's own memory, which it may change when this returns.
            jax.block_until_ready(outputs or new_state)
            for cell in self._state:
                if cell.is_pinned:
                    cell.give_back()
        return self.pack([state.tensor_of(output) for output in outputs])

    def _placed(self, of_state: tuple, of_inputs: Any) -> tuple[tuple, list]:
        """What the step consumes and reads, besides the batch, on several devices."""
        of_read = of_inputs[len(of_inputs) - len(self._read) :]
        return (
            tuple(cell.take(where) for cell, where in zip(self._state, of_state, strict=True)),
            [i.take(w) if isinstance(i, state.Cell) else i for i, w in zip(self._read, of_read, strict=True)],
        )

    def run_in_tensorflow(self, leaves: Sequence[Any]) -> Any:
        """Lets TensorFlow's own XLA run the function that was traced."""
        return self.pack(list(self.bridged.concrete(*self.tensors(leaves))))

    def tensors(self, leaves: Sequence[Any]) -> list[tf.Tensor]:
        """The inputs among the leaves, as tensors."""
        return [tf.convert_to_tensor(leaf) for leaf, given in zip(leaves, self._is_input, strict=True) if given]

    def pack(self, tensors: Sequence[tf.Tensor]) -> Any:
        """Returns what the step returns, given its tensors in order."""
        remaining = iter(tensors)
        values = [next(remaining) if is_tensor else item for is_tensor, item in self._results]
        if self._keys is not None:
            logs = dict(zip(self._keys, values, strict=True))
            return {key: logs[key] for key in self.template}
        return tf.nest.pack_sequence_as(self.template, values, expand_composites=True)

    def _flat(self, *inputs: tf.Tensor) -> list[tf.Tensor]:
        remaining = iter(inputs)
        leaves = [
            next(remaining) if given else constant
            for constant, given in zip(self._constants, self._is_input, strict=True)
        ]
        self.template = self._function(*tf.nest.pack_sequence_as(self._args, leaves))
        self._results, tensors = [], []
        for item in tf.nest.flatten(self.template, expand_composites=True):
            if item is None or isinstance(item, tf.Operation):
                self._results.append((False, None))
            else:
                self._results.append((True, None))
                tensors.append(tf.convert_to_tensor(item))
        is_flat = type(self.template) is dict and all(isinstance(item, tf.Tensor) for item in self.template.values())
        self._keys = sorted(self.template) if is_flat else None
        return tensors


def is_input(leaf: Any) -> bool:
    """Whether an argument of a step is data: an array or a tensor, and not a part of the program."""
    kind = type(leaf)
    if kind is EagerTensor or kind is np.ndarray:  # `isinstance` with `tf.Tensor`, a protocol, takes 20 us
        return True
    return isinstance(leaf, tf.Tensor | np.ndarray | np.generic) and not isinstance(leaf, tf.Variable)


def _spec(index: int, leaf: Any) -> tf.TensorSpec:
    dtype = tf.as_dtype(leaf.dtype)
    if dtype == tf.string or dtype in (tf.resource, tf.variant):
        raise CaptureError(f"input {index} is of dtype {dtype.name}, which XLA does not have")
    return tf.TensorSpec(leaf.shape, dtype)


def _array(leaf: Any) -> np.ndarray:
    return leaf._numpy() if type(leaf) is EagerTensor else np.asarray(leaf)
