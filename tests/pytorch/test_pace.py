"""How far a loop runs ahead of a GPU. JAX on a CPU computes behind the caller too."""

import weakref

import jax.numpy as jnp
import pytest

from trainingcompiler.errors import TrainingCompilerError
from trainingcompiler.frameworks.pytorch.runtime.dispatch_queue import DispatchQueue


class Batch:
    """An input that can be seen to go."""


def test_inputs_are_kept_while_two_programs_may_run():
    dispatch_queue, batches = DispatchQueue(), []
    for _ in range(4):
        batch = Batch()
        batches.append(weakref.ref(batch))
        dispatch_queue.launched([batch], jnp.zeros(3), None, "train.py:3")
        del batch
    assert [batch() is not None for batch in batches] == [False, False, True, True]
    dispatch_queue.settle()
    assert not any(batch() for batch in batches)


def test_a_donated_result_is_not_waited_for():
    dispatch_queue, result = DispatchQueue(), jnp.zeros(3)
    dispatch_queue.launched([], result, None, None)
    result.delete()
    dispatch_queue.settle()


def test_a_value_out_of_range_is_told_when_its_program_has_ended():
    dispatch_queue = DispatchQueue()
    for holds in (True, False, True):
        dispatch_queue.launched([], jnp.zeros(3), jnp.array(holds), "train.py:3")
    with pytest.raises(TrainingCompilerError) as told:
        dispatch_queue.launched([], jnp.zeros(3), jnp.array(True), "train.py:3")
    assert str(told.value) == (
        "a value was out of range, such as an index, in the step at train.py:3, which left the model as it was; up to "
        "two steps after it have been made since, as a GPU computes behind the script. With --engine=eager PyTorch "
        "says which value it is"
    )
    dispatch_queue.settle()  # told once
