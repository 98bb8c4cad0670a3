"""A training step that was called, as a program for any batch size: the TensorFlow half of `trainingcompiler.plan`."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from trainingcompiler.errors import CaptureError, TrainingCompilerError, UsageError
from trainingcompiler.frameworks.tensorflow.programs import captured
from trainingcompiler.frameworks.tensorflow.tracing import Shapes, Traces, is_input
from trainingcompiler.program import StepProgram


class CalledStep:
    """A step and the arguments of its call; see `planner.PlannableStep`.

    Args:
        traces: The step.
        args: Nested structures of arrays and tensors.
        labels: What a person calls their leaves.
        shapes: See `StepRunner`.
        tensor_dims: See `StepRunner`.
    """

    def __init__(
        self,
        traces: Traces,
        args: tuple,
        labels: Sequence[str],
        shapes: Shapes | None = None,
        tensor_dims: Callable[[], Mapping[int, int]] | None = None,
    ):
        self._traces, self._args, self._shapes = traces, args, shapes
        self._tensor_dims = tensor_dims
        self._leaves = tf.nest.flatten(args)
        self._labels = labels

    def given(self) -> list[tuple[str, tuple[int, ...]]]:
        """The name and shape of every array among the arguments."""
        named = zip(self._labels, self._leaves, strict=False)
        return [(name, tuple(leaf.shape)) for name, leaf in named if is_input(leaf)]

    def program_at(self, rows: int, batch_size: int) -> StepProgram:
        """Exports the step again, and traces it again where its batch size is not open; values do not matter."""
        leaves = [_with_rows(leaf, rows, batch_size) for leaf in self._leaves]
        args = tf.nest.pack_sequence_as(self._args, leaves)
        try:
            traced = captured(self._traces, "train_step", args, leaves, self._shapes)
        except TrainingCompilerError:
            raise
        except Exception as error:  # the script's own code
            reason = f"tracing it raised {type(error).__name__}: {error}".split("\n")[0]
            if batch_size == rows:
                raise CaptureError(reason) from error
            raise UsageError(
                f"the step cannot be traced with a batch of {batch_size} in place of {rows}: {reason}. Name the "
                "script's option for its batch size, --batch-size-arg=--bs, and the script is run again for every size"
            ) from None
        if self._tensor_dims is not None:
            traced.divide(self._tensor_dims())
        program = traced.bridged.program.with_batch(batch_size)
        return dataclasses.replace(program, name=f"train_step_batch_{batch_size}")

    def eager_bytes(self, rows: int, batch_size: int) -> int | None:
        """TensorFlow does not say what its graphs need."""
        return None

    def variants(self) -> dict[str, "CalledStep"]:
        """Which precision a model computes in is decided when it is made."""
        return {}

    def recipe(self) -> dict[str, Any]:
        """A step does not say which of its variables is a learning rate; Keras does."""
        return {}


def _with_rows(leaf: Any, rows: int, batch_size: int) -> Any:
    if not is_input(leaf) or not len(leaf.shape) or leaf.shape[0] != rows:
        return leaf
    return np.zeros((batch_size, *leaf.shape[1:]), tf.as_dtype(leaf.dtype).as_numpy_dtype)
