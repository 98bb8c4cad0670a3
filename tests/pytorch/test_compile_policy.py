"""Steps that are new each time: torch runs them until that has taken as long as compiling them."""

import pytest
import torch
from parity import assert_same_training
from small import sgd
from torch.nn import functional as F

from trainingcompiler.frameworks.pytorch.runtime import compile_policy
from trainingcompiler.frameworks.pytorch.runtime.compile_policy import CompilePolicy, NotWorthCompilingError
from trainingcompiler.frameworks.pytorch.session.engine_choice import EngineSelector
from trainingcompiler.reporting.events import Note


def ragged(rows: list[int]) -> list:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 8, generator=generator), torch.randint(0, 4, (n,), generator=generator)) for n in rows]


def learns(objects, data):
    """Reads each loss before its backward, as an agent reads its actions."""
    model, optimizer = objects["model"], objects["optimizer"]
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    return losses


def episodes(objects, data):
    """As many calls of the model as a batch has rows, and one backward."""
    model, optimizer = objects["model"], objects["optimizer"]
    losses = []
    for x, y in data:
        results = []
        for row in x:
            results.append(model(row))
            losses.append(results[-1].argmax().item())
        optimizer.zero_grad()
        loss = F.cross_entropy(torch.stack(results), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def notes(run) -> list[str]:
    return [event.text for event in run.events if isinstance(event, Note) and "PyTorch's until" in event.text]


@pytest.fixture
def impatient(monkeypatch):
    """Nothing may be compiled in vain, and torch's steps never take as long as compiling."""
    monkeypatch.setattr(compile_policy, "_BUDGET_S", {"auto": 0.0, "xla": 0.0})
    monkeypatch.setattr(CompilePolicy, "step_ended", lambda self: self.__dict__.pop("_running", None) is not None)


@pytest.mark.parametrize("loop", [learns, episodes])
def test_steps_that_are_new_each_time_are_torchs_after_the_first_ones(loop, impatient):
    data = ragged(list(range(3, 15)))
    # It is no fallback, which would be an error here: the step can be compiled.
    run = assert_same_training(sgd(), loop, data, may_fall_back=True, fallback="error")
    (note,) = notes(run)
    assert "programs of steps at" in note and "have run once each" in note and "pad to few" in note
    assert run.statistics.eager_steps >= 8 and not run.fallbacks()


def test_shapes_that_come_again_are_compiled(monkeypatch):
    """Each new shape but the first waits, and then pays for its program: torch has had the time that it would take."""
    monkeypatch.setattr(compile_policy, "_BUDGET_S", {"auto": 0.0, "xla": 0.0})
    monkeypatch.setattr(compile_policy, "_FREE_PROGRAMS", 1)
    monkeypatch.setattr(CompilePolicy, "compiled", _note_cheap)
    data = ragged([3, 4, 5] * 6)
    run = assert_same_training(sgd(), learns, data, may_fall_back=True)
    assert run.statistics.compiles >= 3 and run.statistics.compiled_steps > run.statistics.eager_steps > 0


def _note_cheap(policy: CompilePolicy, entries: list, name: str, *_: object) -> None:
    line = policy._line(entries, name)
    line.programs, line.call_s = line.programs + 1, 1e-9


def test_a_long_episode_is_not_compiled_at_first(monkeypatch):
    monkeypatch.setattr(compile_policy, "_MOST_CALLS", 10)
    data = ragged([6, 6, 6])
    run = assert_same_training(sgd(), episodes, data, may_fall_back=True, engine="auto")
    (note,) = notes(run)
    assert "calls, which would take about" in note


class Entry:
    """What a policy asks of an entry of the tape."""

    def __init__(self, call):
        self.where, self.call = "train.py:8", call
        self.modes = type("Modes", (), {"grad": True})


class Path:
    """Stands for a call of the recording, or for a program."""


def test_torch_has_a_path_for_as_long_as_compiling_it_would_take(monkeypatch):
    now_s = 0.0
    monkeypatch.setattr(compile_policy.time, "perf_counter", lambda: now_s)
    policy, paths, programs = CompilePolicy("auto", is_alone=True), [Path() for _ in range(4)], []
    for path in paths[:2]:  # the first two are compiled, whatever they cost
        policy.check([Entry(path)], "train_step")
        programs.append(Path())
        policy.compiled([Entry(path)], "train_step", programs[-1], 20.0)
    for _ in range(4):  # 5 s each, for a program of 20 s
        with pytest.raises(NotWorthCompilingError, match="new each time"):
            policy.check([Entry(paths[2])], "train_step")
        policy.begin_in_torch([Entry(paths[2])])
        now_s += 5.0
        assert policy.step_ended()
    policy.check([Entry(paths[2])], "train_step")
    assert not policy.step_ended()
    with pytest.raises(NotWorthCompilingError):  # another path has a count of its own
        policy.check([Entry(paths[3])], "train_step")
    for program in programs:  # once those that exist have run again, more of them are likely to
        policy.ran_again(program)
    monkeypatch.setattr(compile_policy, "_BUDGET_S", {"auto": 20.0})
    policy.check([Entry(paths[3])], "train_step")


@pytest.mark.parametrize(("engine", "is_alone"), [("auto", False), ("eager", True)])
def test_several_workers_compile_alike(engine, is_alone):
    policy = CompilePolicy(engine, is_alone)
    for _ in range(5):
        policy.check([Entry(Path())], "train_step")
        policy.compiled([Entry(Path())], "train_step", Path(), 100.0)


def test_turns_of_torch_grow_while_steps_are_not_worth_a_program():
    choice, optimizer = EngineSelector("auto"), torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    choice.stepped(optimizer, "eager", waited=True)
    turns = []
    for _ in range(200):
        engine = "xla" if choice.defers else "eager"
        turns.append(engine)
        choice.stepped(optimizer, "eager", waited=engine == "xla")
    assert choice.chosen is None  # a shape may still come again
    assert turns.count("xla") < 12
