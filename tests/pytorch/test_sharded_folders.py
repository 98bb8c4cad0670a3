"""Sharded checkpoints: what is saved is what was there, also while training goes on."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

import trainingcompiler as tc
from trainingcompiler.errors import TrainingCompilerError, UsageError
from trainingcompiler.frameworks.pytorch import checkpoints as module

TOLERANCE = 1e-9  # float64: the first step of a run may be torch's


class Training:
    """A model with every kind of state; `step` trains it."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2)).double()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 20)
        self.parts = {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}

    def step(self, index: int) -> float:
        loss = self.model(torch.randn(16, 8, generator=torch.Generator().manual_seed(index)).double()).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.item()


@pytest.fixture(params=[True, False], ids=["compiled", "eager"])
def compiled(request):
    tc.enable(tc.TrainingCompilerConfig(enabled=request.param, quiet=True, engine="xla"))
    yield request.param
    tc.disable()


def test_a_resumed_run_equals_one_that_was_not_interrupted(compiled, tmp_path):
    whole = Training()
    losses = [whole.step(index) for index in range(20)]

    first = Training()
    with tc.Checkpoints(tmp_path, **first.parts) as checkpoints:
        assert checkpoints.restore() == 0
        for index in range(12):
            assert first.step(index) == pytest.approx(losses[index], rel=TOLERANCE)
            if index == 7:
                checkpoints.save(8)  # the four steps that follow write over its memory while it is being written

    second = Training()
    resumed = tc.Checkpoints(tmp_path, **second.parts)
    assert resumed.restore() == 8
    assert [second.step(index) for index in range(8, 20)] == pytest.approx(losses[8:], rel=TOLERANCE)
    resumed.close()


def test_restoring_in_the_middle_of_a_run_takes_it_back(compiled, tmp_path):
    training = Training()
    with tc.Checkpoints(tmp_path, **training.parts) as checkpoints:
        for index in range(3):
            training.step(index)
        checkpoints.save(3)
        later = [training.step(index) for index in range(3, 6)]
        assert checkpoints.restore() == 3
        assert [training.step(index) for index in range(3, 6)] == pytest.approx(later, rel=TOLERANCE)


def test_only_the_newest_are_kept_and_a_folder_belongs_to_one_run(tmp_path):
    training = Training()
    with tc.Checkpoints(tmp_path, keep=2, **training.parts) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]
    with (
        tc.Checkpoints(tmp_path, **training.parts) as again,
        pytest.raises(UsageError, match="has a checkpoint of step 3, and step 2 is not newer: restore"),
    ):
        again.save(2)


def test_what_was_cut_off_is_not_taken_for_a_checkpoint(tmp_path):
    training = Training()
    with tc.Checkpoints(tmp_path, **training.parts) as checkpoints:
        checkpoints.save(4)
    (tmp_path / "9.orbax-checkpoint-tmp").mkdir()
    with tc.Checkpoints(tmp_path, **training.parts) as checkpoints:
        assert checkpoints.restore() == 4


class Odd:
    """State of every kind that is not a number."""

    def __init__(self, state: dict):
        self.state = state

    def state_dict(self) -> dict:
        return self.state

    def load_state_dict(self, state: dict) -> None:
        self.state = state


def test_every_kind_of_value_comes_back(tmp_path):
    state = {
        "half": torch.randn(3).bfloat16(),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3),
        "flags": torch.tensor([True, False]),
        "nested": {1: (2, [torch.ones(2, 2), None, "text"]), "x": 0.1},
    }
    odd = Odd(copy.deepcopy(state))
    with tc.Checkpoints(tmp_path, odd=odd) as checkpoints:
        checkpoints.save(1)
        odd.state = {}
        checkpoints.close()
        assert checkpoints.restore() == 1
    torch.testing.assert_close({**odd.state, "nested": None}, {**state, "nested": None}, rtol=0, atol=0)
    assert odd.state["half"].dtype is torch.bfloat16
    assert odd.state["nested"][1][1][1:] == [None, "text"] and isinstance(odd.state["nested"][1], tuple)


FULL = """
import resource, signal, sys
import torch
import trainingcompiler as tc

model = torch.nn.Linear(512, 512)
checkpoints = tc.Checkpoints(sys.argv[1], model=model)
checkpoints.save(1)
checkpoints.close()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))  # no file may be larger, as on a full disk
checkpoints.save(2)
checkpoints.close()
"""


def test_a_full_disk_is_an_error_and_the_older_one_stays(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "File too large" in done.stderr.splitlines()[-1] or "errno: 27" in done.stderr, done.stderr[-2000:]
    model = nn.Linear(512, 512)
    assert tc.Checkpoints(tmp_path, model=model).restore() == 1


def test_bad_input(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="nothing to save: give it model=model, optimizer=optimizer; keep=0: must be"):
        tc.Checkpoints(tmp_path, keep=0)
    with pytest.raises(UsageError, match=r"rate is a float, which has no state_dict\(\) and load_state_dict\(\)"):
        tc.Checkpoints(tmp_path, rate=0.1)
    with pytest.raises(UsageError, match="cannot be read back safely"):
        tc.Checkpoints(tmp_path, odd=Odd({"x": object})).save(1)
    training = Training()
    with tc.Checkpoints(tmp_path, **training.parts) as checkpoints:
        checkpoints.save(5)
    with pytest.raises(TrainingCompilerError, match="5 has model, optimizer, schedule, and this script saves model: "):
        tc.Checkpoints(tmp_path, model=training.model).restore()
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(UsageError, match=r'pip install "trainingcompiler\[checkpoints\]"'):
        module.Checkpoints(tmp_path, model=training.model)
