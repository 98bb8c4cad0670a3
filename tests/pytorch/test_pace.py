"""How far a loop runs ahead of a GPU. JAX on a CPU computes behind the caller too."""

import weakref

import jax.numpy as jnp
import pytest

from trainingcompiler.errors import TrainingCompilerError
from trainingcompiler.frameworks.pytorch.runtime.dispatch_queue import Pace


class Batch:
    """An input that can be seen to go."""


def test_inputs_are_kept_while_two_programs_may_run():
    pace, batches = Pace(), []
    for _ in range(4):
        batch = Batch()
        batches.append(weakref.ref(batch))
        pace.launched([batch], jnp.zeros(3), None, "train.py:3")
        del batch
    assert [batch() is not None for batch in batches] == [False, False, True, True]
    pace.settle()
    assert not any(batch() for batch in batches)


def test_a_donated_result_is_not_waited_for():
    pace, result = Pace(), jnp.zeros(3)
    pace.launched([], result, None, None)
    result.delete()
    pace.settle()


def test_a_value_out_of_range_is_told_when_its_program_has_ended():
    pace = Pace()
    for holds in (True, False, True):
        pace.launched([], jnp.zeros(3), jnp.array(holds), "train.py:3")
    with pytest.raises(TrainingCompilerError) as told:
        pace.launched([], jnp.zeros(3), jnp.array(True), "train.py:3")
    assert str(told.value) == (
        "a value was out of range, such as an index, in the step at train.py:3, which left the model as it was; up to "
        "two steps after it have been made since, as a GPU computes behind the script. With --engine=eager PyTorch "
        "says which value it is"
    )
    pace.settle()  # told once
