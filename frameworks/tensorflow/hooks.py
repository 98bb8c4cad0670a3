"""The places where TensorFlow looks at a variable: its handle, the call of a graph that holds one, a `tf.data`
pipeline.

Reads in Python (`numpy()`, `assign`, `get_weights`, checkpoints, a saved model) and TensorFlow's C++ fast path all
fetch `_handle` from the object. A graph was given the handle when it was traced, so its calls are watched; so are the
functions of datasets, which run in threads that nobody calls.
"""

import functools
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tensorflow.python.data.ops.structured_function import StructuredFunctionWrapper
from tensorflow.python.eager.polymorphic_function.concrete_function import ConcreteFunction
from tensorflow.python.ops.resource_variable_ops import BaseResourceVariable

from trainingcompiler.adapters.patches import Patches
from trainingcompiler.frameworks.tensorflow import state

_patches = Patches()


class _WatchedHandle:
    """A variable's `_handle`: asking for it moves the value back to TensorFlow first.

    The handle itself stays in the object, so that removing this descriptor leaves variables as they were.
    """

    def __get__(self, variable: Any, owner: type | None = None) -> Any:
        if variable is None:
            return self
        try:
            handle = variable.__dict__["_handle"]
        except KeyError:
            raise AttributeError("_handle") from None
        state.give_back_by_handle(handle)
        return handle

    def __set__(self, variable: Any, handle: Any) -> None:
        variable.__dict__["_handle"] = handle


def install() -> None:
    """Watches variables from now on; a second call does nothing."""
    if _patches:
        return
    _patches.replace(BaseResourceVariable, "_handle", _WatchedHandle(), "who looks at a variable gets its value")
    _wrap(ConcreteFunction, "_call_flat", _watched_call, "so does a graph that holds the handle")
    _wrap(StructuredFunctionWrapper, "__init__", _watched_pipeline, "so does a tf.data pipeline, in its own threads")


def uninstall() -> None:
    """Gives everything back to TensorFlow, and leaves it as it was."""
    state.give_back_all()
    _patches.restore()


def _wrap(owner: type, name: str, wrap: Callable, why: str) -> None:
    original = getattr(owner, name)
    _patches.replace(owner, name, functools.wraps(original)(wrap(original)), why)


def _watched_call(original: Callable) -> Callable:
    def _call_flat(self, tensor_inputs, captured_inputs):
        for tensor in captured_inputs:
            state.give_back_by_handle(tensor)
        return original(self, tensor_inputs, captured_inputs)

    return _call_flat


def _watched_pipeline(original: Callable) -> Callable:
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        for variable in self._function.graph.variables:
            if isinstance(variable, tf.Variable):
                state.pin(variable)

    return __init__
