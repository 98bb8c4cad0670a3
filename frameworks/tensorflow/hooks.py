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

from trainingcompiler.frameworks.tensorflow import state

_originals: list[tuple[type, str, Any]] = []


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
    if _originals:
        return
    _originals.append((BaseResourceVariable, "_handle", None))
    BaseResourceVariable._handle = _WatchedHandle()
    _replace(ConcreteFunction, "_call_flat", _watched_call)
    _replace(StructuredFunctionWrapper, "__init__", _watched_pipeline)


def uninstall() -> None:
    """Gives everything back to TensorFlow, and leaves it as it was."""
    state.give_back_all()
    while _originals:
        owner, name, original = _originals.pop()
        if original is None:
            delattr(owner, name)
        else:
            setattr(owner, name, original)


def _replace(owner: type, name: str, wrap: Callable) -> None:
    original = getattr(owner, name)
    _originals.append((owner, name, original))
    setattr(owner, name, functools.wraps(original)(wrap(original)))


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
