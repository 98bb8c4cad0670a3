"""The choice between the engines: by the user's word, or by the time of the script's own first steps."""

import types

import pytest
import torch
from parity import assert_same, assert_same_training, train
from small import batches, sgd, train_on

from trainingcompiler.frameworks.pytorch.session import engine_choice as engine_module
from trainingcompiler.frameworks.pytorch.session.engine_choice import EngineSelector
from trainingcompiler.frameworks.pytorch.session.engine_trial import EngineTrial
from trainingcompiler.reporting.events import EngineChosen, Note, subscribe
from trainingcompiler.reporting.statistics import current as statistics


class Clock:
    """A clock that only moves when it is told to."""

    def __init__(self, monkeypatch):
        self.now_s = 100.0
        monkeypatch.setattr(engine_module, "time", types.SimpleNamespace(perf_counter=lambda: self.now_s))


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture
def chosen():
    events = []
    unsubscribe = subscribe(lambda event: events.append(event) if isinstance(event, EngineChosen) else None)
    yield events
    unsubscribe()


def optimizer():
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)


def run_steps(choice, clock, seconds, steps=60, of=None):
    """Takes steps of the given lengths until the choice is made; returns who ran each."""
    of = of or optimizer()
    engines = []
    for _ in range(steps):
        if choice.chosen is not None:
            break
        engine = "xla" if choice.defers else "eager"
        clock.now_s += seconds[engine]
        choice.stepped(of, engine)
        engines.append(engine)
    return engines


@pytest.mark.parametrize(
    ("eager_s", "xla_s", "winner"),
    [(0.010, 0.005, "xla"), (0.005, 0.010, "eager"), (1.0, 0.5, "xla"), (0.5, 1.0, "eager"), (0.1, 0.104, "xla")],
)
def test_the_faster_engine_wins(clock, chosen, eager_s, xla_s, winner):
    choice = EngineSelector("auto")
    engines = run_steps(choice, clock, {"eager": eager_s, "xla": xla_s})
    assert choice.chosen == winner and choice.defers == (winner == "xla")
    (event,) = chosen
    assert event.engine == winner
    assert event.times_ms == pytest.approx({"eager": eager_s * 1000, "xla": xla_s * 1000})
    assert all(one != two for one, two in zip(engines, engines[1:], strict=False))  # by turns: drift hits both


def test_short_and_close_steps_are_timed_more_often(clock):
    cases = {"short": (0.001, 0.0005), "close": (2.0, 1.9), "clear": (2.0, 1.0)}
    counts = {
        name: len(run_steps(EngineSelector("auto"), clock, {"eager": eager_s, "xla": xla_s}))
        for name, (eager_s, xla_s) in cases.items()
    }
    assert counts["clear"] <= 8 and counts["short"] >= 20 and counts["close"] >= 20


def test_a_busy_machine_does_not_decide(clock, chosen):
    """Other work adds time to some steps; the fastest of each engine is what counts."""
    choice, of = EngineSelector("auto"), optimizer()
    for index in range(60):
        if choice.chosen is None:
            engine = "xla" if choice.defers else "eager"
            clock.now_s += {"eager": 0.15, "xla": 0.11}[engine] + (0.4 if engine == "xla" and index % 4 else 0.0)
            choice.stepped(of, engine)
    assert choice.chosen == "xla" and chosen[0].times_ms["xla"] == pytest.approx(110)


def test_steps_that_compile_are_not_timed(clock, chosen, monkeypatch):
    choice, of = EngineSelector("auto"), optimizer()
    choice.stepped(of, "eager")
    compiles = statistics().compiles
    monkeypatch.setattr(statistics(), "compiles", compiles + 1)
    clock.now_s += 50.0  # a step that compiled
    choice.stepped(of, "xla")
    run_steps(choice, clock, {"eager": 0.2, "xla": 0.1}, of=of)
    assert choice.chosen == "xla" and chosen[0].times_ms["xla"] == pytest.approx(100.0)


@pytest.mark.parametrize("engine", ["xla", "eager"])
def test_the_users_word_is_not_measured(engine, clock, chosen):
    choice = EngineSelector(engine)
    choice.stepped(optimizer(), engine)
    assert choice.chosen == engine and choice.defers == (engine == "xla") and not chosen


def test_another_optimizers_steps_are_not_timed(clock):
    choice, first, second = EngineSelector("auto"), optimizer(), optimizer()
    choice.stepped(first, "eager")
    for _ in range(20):
        clock.now_s += 0.1
        choice.stepped(second, "eager")
    assert choice.chosen is None


def test_engines_change_where_a_batch_of_several_optimizers_ends(clock):
    choice, first, second = EngineSelector("auto"), optimizer(), optimizer()
    turns = []
    for _ in range(4):
        for of, is_same_batch in ((first, False), (second, True)):
            clock.now_s += 0.1
            turns.append(choice.defers)
            choice.stepped(of, "xla" if choice.defers else "eager", is_same_batch)
    assert turns[2:] == [True, True, False, False, True, True]


def test_optimizers_that_never_clear_gradients_do_not_take_the_end_from_each_other(clock, chosen):
    choice, both = EngineSelector("auto"), (optimizer(), optimizer())
    for step in range(100):
        clock.now_s += 0.1
        choice.stepped(both[step % 2], "xla" if choice.defers else "eager", True)
    assert choice.chosen == "xla" and chosen


def test_nothing_compiled_ends_the_choice(clock, chosen):
    """A loop that always falls back runs eagerly whoever is chosen; there is nothing to time."""
    choice, of = EngineSelector("auto"), optimizer()
    for _ in range(30):
        clock.now_s += 0.1
        choice.stepped(of, "eager")
    assert choice.chosen == "xla" and not chosen


def test_auto_skips_and_repeats_no_batch():
    def loop(objects, data):
        seen = []
        for index, (x, y) in enumerate(data):
            seen += [index, *train_on(objects["model"], objects["optimizer"], [(x, y)])]
        return seen

    run = assert_same_training(sgd(), loop, batches(40), may_fall_back=True, max_compiles=1, engine="auto")
    assert run.statistics.steps == 40
    assert run.statistics.compiled_steps >= 3 and run.statistics.eager_steps >= 3  # as many as are timed of each
    (event,) = [event for event in run.events if isinstance(event, EngineChosen)]
    assert event.engine in ("xla", "eager") and min(event.times_ms.values()) > 0


@pytest.mark.parametrize("winner", ["eager", "xla"])
def test_what_has_won_runs_the_rest(winner, monkeypatch):
    """The clock favours one engine; the training is the same."""
    times = {"eager": 0.3, "xla": 0.3, winner: 0.1}
    now_s = 0.0
    stepped = EngineSelector.stepped

    def timed(self, of, engine, is_same_batch, waited):
        nonlocal now_s
        now_s += times[engine]
        stepped(self, of, engine, is_same_batch, waited)

    monkeypatch.setattr(EngineSelector, "stepped", timed)
    monkeypatch.setattr(engine_module, "time", types.SimpleNamespace(perf_counter=lambda: now_s))

    def loop(objects, data):
        return train_on(objects["model"], objects["optimizer"], data)

    eager = train(sgd(), loop, batches(30), compiled=False)
    run = train(sgd(), loop, batches(30), compiled=True, engine="auto")
    assert_same(eager, run, eager)
    others = run.statistics.compiled_steps if winner == "eager" else run.statistics.eager_steps
    assert others <= 6 and run.statistics.steps == 30


def test_eager_compiles_nothing():
    def loop(objects, data):
        return train_on(objects["model"], objects["optimizer"], data)

    run = train(sgd(), loop, batches(20), compiled=True, engine="eager")
    assert run.statistics.compiles == 0 and run.statistics.eager_steps == 20


class LongTurns(EngineTrial):
    """Of four steps; what is called is noted."""

    steps = 4

    def __init__(self, room=True):
        self.called, self.room = [], room

    def finish(self):
        self.called.append("finish")

    def has_room(self):
        return self.room

    def begin(self, engine):
        self.called.append(engine)


@pytest.mark.parametrize(("eager_s", "xla_s", "winner"), [(1.0, 0.5, "xla"), (0.5, 1.0, "eager")])
def test_long_turns_leave_out_their_first_step(clock, chosen, eager_s, xla_s, winner):
    turns = LongTurns()
    choice = EngineSelector("auto", turns)
    of, engines = optimizer(), []
    while choice.chosen is None:
        engine = "xla" if choice.defers else "eager"
        is_first = engine not in engines[-1:]
        clock.now_s += {"eager": eager_s, "xla": xla_s}[engine] / (10 if is_first else 1)  # would decide wrongly
        choice.stepped(of, engine)
        engines.append(engine)
    assert choice.chosen == winner and engines == ["xla"] * 4 + ["eager"] * 4
    assert chosen[0].times_ms == {"eager": eager_s * 1000, "xla": xla_s * 1000}
    assert [call for call in turns.called if call != "finish"] == ["eager", "xla", winner]
    assert turns.called.count("finish") == len(engines)


def test_without_room_for_torchs_step_it_is_not_tried(clock, chosen):
    notes = []
    unsubscribe = subscribe(lambda event: notes.append(event) if isinstance(event, Note) else None)
    choice = EngineSelector("auto", LongTurns(room=False))
    assert run_steps(choice, clock, {"xla": 0.1, "eager": 0.1}) == ["xla"] * 4
    unsubscribe()
    assert choice.chosen == "xla" and not chosen
    assert [note.text for note in notes] == [
        "PyTorch's own step is not tried and timed: it may need more memory than there is. --engine=eager has it run"
    ]
