"""Events and the statistics of a run."""

import pytest

from trainingcompiler.reporting import events
from trainingcompiler.reporting.statistics import RunStatistics


def test_subscribers_get_events_until_they_unsubscribe():
    collected: list[events.Event] = []
    unsubscribe = events.subscribe(collected.append)
    events.emit(events.Note(text="one"))
    unsubscribe()
    events.emit(events.Note(text="two"))
    assert collected == [events.Note(text="one")]


def test_logging_has_every_event_at_debug_level(caplog):
    events.emit(events.Note(text="one"))
    with caplog.at_level("DEBUG", logger="trainingcompiler"):
        events.emit(events.Note(text="two"))
    assert caplog.messages == ["Note(text='two')"]


def test_a_phase_is_two_events_and_its_detail_can_grow(seen):
    with events.phase("capture", "train step") as running:
        running.detail += ", 12 ops"
    started, ended = seen
    assert started == events.PhaseStarted(name="capture")
    assert (ended.name, ended.detail) == ("capture", "train step, 12 ops")
    assert ended.duration_s >= 0


def test_a_phase_ends_when_an_exception_passes(seen):
    with pytest.raises(RuntimeError), events.phase("compile"):
        raise RuntimeError
    assert seen[-1].detail == "(failed)"


def test_statistics_count_steps_by_engine():
    run = RunStatistics(started_s=10.0)
    assert run.step_time_s is None
    for engine, now_s in [("eager", 12.0), ("xla", 12.5), ("xla", 12.6), ("xla", 12.7)]:
        run.step_finished(engine, now_s)
    assert (run.steps, run.eager_steps, run.compiled_steps) == (4, 1, 3)
    assert (run.time_to_first_step_s, run.time_to_compiled_step_s) == (2.0, 2.5)
    assert run.step_time_s == pytest.approx(0.1)
    assert run.summary() == (
        "4 steps (3 compiled, 1 eager), 100.0 ms/step (median), 0 compiles in 0.0 s, first step after 2.0 s, "
        "first compiled step after 2.5 s"
    )


def test_statistics_do_not_grow_with_the_run():
    run = RunStatistics(started_s=0.0)
    for step in range(5000):
        run.step_finished("xla", step if step < 3000 else 3000 + (step - 3000) * 0.01)
    assert len(run._durations_s) == 1001
    assert run.step_time_s == pytest.approx(0.01)
    assert run.steps == 5000


def test_ending_is_said_once(seen):
    events.end_at_exit()
    events.end()
    assert [type(event) for event in seen] == [events.Ended]
