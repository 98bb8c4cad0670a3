"""The program of a Keras model's training step, without training: to compile it for a GPU that is not there."""

from typing import Any

import tensorflow as tf

from trainingcompiler.errors import UsageError
from trainingcompiler.frameworks.tensorflow.programs import captured
from trainingcompiler.frameworks.tensorflow.tracing import Traces
from trainingcompiler.program import StepProgram


def step_program(model: Any, batch: Any) -> StepProgram:
    """Returns the step that `model.fit` makes on `batch`; nothing is trained.

    Args:
        model: A Keras model on the TensorFlow backend, after `model.compile`. It is built if it was not.
        batch: What a dataset would give: a tuple of inputs, targets and perhaps sample weights, as arrays or tensors.

    Raises:
        UsageError: The model has not been compiled with an optimizer.
        CaptureError: The step cannot be a program of XLA.
    """
    if not model.compiled or model.optimizer is None:
        raise UsageError("step_program(model): the model has no optimizer yet; call model.compile(optimizer, loss)")
    traced = tf.function(model.train_step, autograph=False)
    traces = Traces(traced.get_concrete_function, is_checked=not model.jit_compile)
    return captured(traces, "train_step", (batch,), tf.nest.flatten((batch,))).bridged.program
