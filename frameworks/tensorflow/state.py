"""Training state: variables whose values live in XLA's buffers while compiled steps run, and in TensorFlow otherwise.

A step's first run takes its variables over (`VariableState.take`), and whatever asks a variable for its handle, which
every read and every write in TensorFlow has to, gets it back first (`VariableState.give_back`; see `hooks`). So every
reader sees current values, every write is honoured by the next step, and a loop in which nobody looks moves nothing.

TensorFlow's last copy is kept while a value is away: a thread that has fetched the handle and reads a moment later,
when the next step is running, gets the value of the step before, as it would without us, and not an empty one.
"""

import threading
import weakref
from typing import Any

import jax
import numpy as np
import tensorflow as tf
from jax.sharding import Sharding
from tensorflow.python.framework.ops import EagerTensor

from trainingcompiler.parallel.arrays import owned_array, placed_array

lock = threading.RLock()
"""Held while a step runs and while values move: another thread that reads a variable waits for the step."""

_states: dict[int, "VariableState"] = {}  # by the identity of the variable's handle, as graphs that capture it know it
_PINNED = "_trainingcompiler_is_pinned"


class VariableState:
    """One variable that compiled steps read or write.

    Attributes:
        array: Its value in a buffer that XLA owns; None while TensorFlow has it.
        is_ahead: Whether `array` is newer than TensorFlow's value.
        is_pinned: Whether a `tf.data` pipeline reads the variable from threads of its own, so that it has to be given
            back after every step.
    """

    __slots__ = ("array", "dtype", "handle", "is_ahead", "is_pinned")

    def __init__(self, variable: tf.Variable):
        self.handle: Any = variable.handle
        self.dtype = variable.dtype
        self.array: jax.Array | None = None
        self.is_ahead = False
        self.is_pinned = bool(vars(variable).get(_PINNED, False))

    def take(self, sharding: Sharding | None) -> jax.Array:
        """The value for a step to read, or to consume, placed as the step wants it; None is the one device."""
        if self.array is None:
            values = tf.raw_ops.ReadVariableOp(resource=self.handle, dtype=self.dtype)._numpy()
            self.array = owned_array(values) if sharding is None else placed_array(values, sharding)
        elif sharding is not None:
            self.array = placed_array(self.array, sharding)
        return self.array

    def update(self, array: jax.Array) -> None:
        """Takes over what a step has made of the value it consumed."""
        self.array = array
        self.is_ahead = True

    def give_back(self) -> None:
        """Moves the value to TensorFlow; without effect while it is there."""
        with lock:
            array = self.array
            if array is None:
                return
            if self.is_ahead:
                with tf.init_scope():  # a graph may be under construction
                    tf.raw_ops.AssignVariableOp(resource=self.handle, value=tensor_of(array))
            self.array, self.is_ahead = None, False


def state_of(variable: tf.Variable) -> VariableState:
    """The variable's state, made on first use; it goes when the variable does."""
    key = id(variable.handle)
    found = _states.get(key)
    if found is None:
        found = _states[key] = VariableState(variable)
        weakref.finalize(variable, _states.pop, key, None).atexit = False
    return found


def give_back_by_handle(handle: Any) -> None:
    """Lets TensorFlow have the value of the variable that the handle is of."""
    state = _states.get(id(handle))
    if state is not None and state.array is not None:
        state.give_back()


def give_back_all() -> None:
    """Lets TensorFlow have every value."""
    for state in list(_states.values()):
        state.give_back()


def pin(variable: tf.Variable) -> None:
    """Gives the variable back after every step from now on."""
    vars(variable)[_PINNED] = True
    state = _states.get(id(variable.handle))
    if state is not None:
        state.is_pinned = True


def tensor_of(values: Any) -> tf.Tensor:
    """An eager tensor with a copy of an array's values."""
    return EagerTensor(np.array(values), device=_DEVICE, dtype=None)


_DEVICE = "/job:localhost/replica:0/task:0/device:CPU:0"
