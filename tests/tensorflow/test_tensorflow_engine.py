"""The choice between our program and TensorFlow's two ways, by the time of real steps."""

import pytest

from trainingcompiler.frameworks.tensorflow.engine import TF_GRAPH, TF_XLA, XLA, EngineSelector
from trainingcompiler.reporting.events import EngineChosen, subscribe

ALL = (XLA, TF_GRAPH, TF_XLA)


@pytest.fixture
def chosen():
    events = []
    unsubscribe = subscribe(lambda event: events.append(event) if isinstance(event, EngineChosen) else None)
    yield events
    unsubscribe()


def run(choice, seconds, steps=200):
    """Takes steps of the given lengths, the first of every turn ten times as long; returns who ran each."""
    engines = []
    for _ in range(steps):
        if choice.chosen is not None:
            break
        engine = choice.next
        is_first = not engines or engines[-1] != engine
        choice.ran(engine, seconds[engine] * (10 if is_first else 1))
        engines.append(engine)
    return engines


@pytest.mark.parametrize(
    ("seconds", "winner"),
    [
        ({XLA: 0.001, TF_GRAPH: 0.0012, TF_XLA: 0.0011}, XLA),
        ({XLA: 0.2, TF_GRAPH: 0.1, TF_XLA: 0.3}, TF_GRAPH),
        ({XLA: 0.19, TF_GRAPH: 0.2, TF_XLA: 0.1}, TF_XLA),
        ({XLA: 0.104, TF_GRAPH: 0.1, TF_XLA: 0.2}, XLA),  # equal within the noise
    ],
)
def test_the_fastest_wins_and_all_figures_are_told(seconds, winner, chosen):
    choice = EngineSelector(ALL)
    run(choice, seconds)
    assert choice.chosen == choice.next == winner
    (event,) = chosen
    assert event.engine == winner
    assert event.times_ms == pytest.approx({engine: value * 1000 for engine, value in seconds.items()})


def test_short_and_close_steps_are_timed_more_often():
    clear = run(EngineSelector(ALL), {XLA: 0.1, TF_GRAPH: 0.3, TF_XLA: 0.5})
    short = run(EngineSelector(ALL), {XLA: 0.0010, TF_GRAPH: 0.0012, TF_XLA: 0.0015})
    assert len(clear) < len(short)
    assert {engine: short.count(engine) for engine in ALL} == {XLA: 12, TF_GRAPH: 12, TF_XLA: 12}


def test_a_hopeless_engine_gets_no_further_turn():
    engines = run(EngineSelector(ALL), {XLA: 0.0010, TF_GRAPH: 0.0012, TF_XLA: 0.02})
    assert engines.count(TF_XLA) == 4 and engines.count(XLA) == 12


def test_tensorflows_xla_is_not_compiled_where_the_graph_is_far_behind():
    engines = run(EngineSelector(ALL), {XLA: 0.001, TF_GRAPH: 0.0014, TF_XLA: 0.0})
    assert TF_XLA not in engines


def test_steps_that_are_not_typical_are_not_timed(chosen):
    choice = EngineSelector((XLA, TF_GRAPH))
    for _ in range(4):
        choice.ran(XLA, 0.1)
    choice.ran(TF_GRAPH, 5.0)
    choice.ran(TF_GRAPH, 0.001, is_typical=False)
    for _ in range(3):
        choice.ran(TF_GRAPH, 0.5)
    assert choice.chosen == XLA and chosen[0].times_ms[TF_GRAPH] == 500


def test_a_single_engine_is_not_measured(chosen):
    choice = EngineSelector((XLA,))
    assert choice.chosen == XLA and run(choice, {}) == [] and not chosen
