"""What workers say of each other's programs, before they wait for each other."""

import pytest

from trainingcompiler.errors import TrainingCompilerError
from trainingcompiler.parallel import spmd

MINE = {"name": "train_step", "where": "train.py:9", "inputs": ["a batch of float32[8, 4]", "a batch of int64[8]"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "forward_backward"}, "rank 0 runs train_step, and rank 1 runs forward_backward"),
        ({"where": "train.py:12"}, "rank 0 is at train.py:9, and rank 1 is at train.py:12"),
        (
            {"inputs": ["a batch of float32[3, 4]", "a batch of int64[3]"]},
            "rank 0 has a batch of float32[8, 4], and rank 1 a batch of float32[3, 4], at train.py:9",
        ),
        ({"inputs": MINE["inputs"][:1]}, "rank 0 has 2 inputs, and rank 1 1, at train.py:9"),
    ],
)
def test_workers_that_come_to_different_programs_are_told_the_difference(changes, message, monkeypatch):
    monkeypatch.setattr(spmd, "share", lambda key, value: [value, {**value, **changes}])
    agreement = spmd.ProgramAgreement()
    agreement._watching = True  # no thread: nobody is stuck here
    with pytest.raises(TrainingCompilerError) as caught:
        agreement.meet(**MINE)
    assert message in str(caught.value) and "DistributedSampler" in str(caught.value)


def test_workers_that_agree_go_on(monkeypatch):
    keys = []
    monkeypatch.setattr(spmd, "share", lambda key, value: keys.append(key) or [value, value])
    agreement = spmd.ProgramAgreement()
    agreement._watching = True
    agreement.meet(**MINE)
    agreement.meet(**MINE)
    other = spmd.ProgramAgreement()
    other._watching = True
    other.meet(**MINE)
    assert len(set(keys)) == 3  # a key that was used is used up
