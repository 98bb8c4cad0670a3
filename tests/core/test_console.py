"""What a person sees."""

import io
import threading

import pytest

from trainingcompiler import __version__
from trainingcompiler.reporting import events
from trainingcompiler.reporting.console import HEARTBEAT_S, NOTHING_TRAINED, Console
from trainingcompiler.reporting.statistics import RunStatistics


class Clock:
    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


def rendered(*happened: events.Event, **options) -> str:
    stream = io.StringIO()
    console = Console(stream, **{"is_terminal": False, **options})
    for event in happened:
        console(event)
    return stream.getvalue()


def test_the_banner_says_versions_device_and_whether_steps_are_compiled():
    started = events.Started(versions={"torch": "2.13.0", "jax": "0.10.2"}, device="cpu, 2 cores", compiled=True)
    assert rendered(started) == (
        f"trainingcompiler {__version__}  torch 2.13.0  jax 0.10.2  cpu, 2 cores  compiled: yes\n"
    )
    refused = events.Started(versions={}, device="", compiled=False, reason="TRAININGCOMPILER=0")
    assert rendered(refused) == f"trainingcompiler {__version__}  compiled: no because TRAININGCOMPILER=0\n"


def test_a_phase_is_one_line_with_its_seconds():
    line = rendered(
        events.PhaseStarted(name="capture"),
        events.PhaseEnded(name="capture", duration_s=3.14, detail="train step at train.py:88  1,204 ops"),
    )
    assert line.startswith("[capture]    train step at train.py:88  1,204 ops  ")
    assert line.endswith("  3.1 s\n")


def test_a_recompile_is_one_line_with_both_shapes_and_the_cure():
    event = events.Recompiled(
        changed='batch["x"] float32[16, 8] -> float32[7, 8]',
        where="train.py:88",
        count=2,
        compile_time_s=41.0,
        cure="DataLoader(..., drop_last=True)",
    )
    line = rendered(event)
    assert line.count("\n") == 1
    assert '#2 at train.py:88: batch["x"] float32[16, 8] -> float32[7, 8]; to avoid it: DataLoader(' in line
    assert line.endswith("41.0 s\n")


def test_fallback_engine_cache_and_note_lines():
    happened = [
        events.FellBack(reason="LBFGS takes a closure", where="train.py:9", permanent=True),
        events.FellBack(reason="values differ", where=None, permanent=False),
        events.FellBack(reason="XLA has no kernel", where=None, permanent=True, how="as TensorFlow runs it"),
        events.EngineChosen(engine="eager", times_ms={"eager": 12.34, "xla": 1500.0}),
        events.CacheDamaged(path="a/b-cache", error="zlib.error: -3"),
        events.Note(text="something"),
    ]
    assert rendered(*happened).splitlines() == [
        "[fallback]   this step runs eagerly from now on at train.py:9: LBFGS takes a closure",
        "[fallback]   one step ran eagerly: values differ",
        "[fallback]   this step runs as TensorFlow runs it from now on: XLA has no kernel",
        "[engine]     eager from now on: a step took 12.3 ms eager, 1,500.0 ms compiled",
        "[cache]      a damaged entry was removed, its program is compiled again: a/b-cache (zlib.error: -3)",
        "[note]       something",
    ]


def test_the_summary():
    run = RunStatistics(compiles=2, compile_time_s=3.1, cache_hits=1, fallbacks=1, started_s=0.0)
    run.step_finished("xla", 4.0)
    run.step_finished("xla", 4.00125)
    assert rendered(events.Ended(statistics=run)) == (
        "[done]       2 steps, 1.25 ms/step (median), 2 compiles (1 from the cache) in 3.1 s, 1 fallback, "
        "first step after 4.0 s\n"
    )
    assert NOTHING_TRAINED in rendered(events.Ended(statistics=RunStatistics()))


def test_quiet_keeps_what_changes_the_run():
    run = RunStatistics()
    run.step_finished("xla", 0.0)
    silent = [
        events.Started(versions={}, device="cpu", compiled=True),
        events.PhaseStarted(name="compile"),
        events.PhaseEnded(name="compile", duration_s=1.0),
        events.Note(text="x"),
        events.Ended(statistics=run),
    ]
    assert rendered(*silent, quiet=True) == ""
    loud = [
        events.FellBack(reason="r", where=None, permanent=True),
        events.Recompiled(changed="c", where=None, count=2, compile_time_s=1.0),
        events.CacheDamaged(path="p", error="e"),
        events.Ended(statistics=RunStatistics()),
    ]
    assert len(rendered(*loud, quiet=True).splitlines()) == len(loud)


def test_a_heartbeat_line_says_how_long_the_innermost_phase_has_run():
    stream, clock = io.StringIO(), Clock()
    console = Console(stream, is_terminal=False, clock=clock)
    console.tick()
    console(events.PhaseStarted(name="first step"))
    console(events.PhaseStarted(name="compile"))
    clock.now_s += HEARTBEAT_S
    console.tick()
    console(events.PhaseEnded(name="compile", duration_s=12.0))
    clock.now_s += HEARTBEAT_S
    console.tick()
    console(events.PhaseEnded(name="first step", duration_s=20.0))
    console.tick()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "[compile]    still running after 10 s"
    assert lines[2] == "[first step] still running after 20 s"
    assert len(lines) == 4


def test_the_heartbeat_beats_by_itself_while_a_phase_runs(monkeypatch):
    monkeypatch.setattr("trainingcompiler.reporting.console.HEARTBEAT_S", 0.001)
    beaten = threading.Event()

    class Stream(io.StringIO):
        def write(self, text):
            if "still running" in text:
                beaten.set()
            return super().write(text)

    console = Console(Stream(), is_terminal=False)
    console(events.PhaseStarted(name="compile"))
    assert beaten.wait(timeout=60)
    console(events.PhaseEnded(name="compile", duration_s=0.0))
    assert console._heart is None


def test_a_terminal_shows_a_bar_on_one_live_line():
    stream, clock = io.StringIO(), Clock()
    console = Console(stream, is_terminal=True, clock=clock)
    console(events.PhaseStarted(name="compile"))
    clock.now_s += 61.0
    console.tick()
    console(events.PhaseEnded(name="compile", duration_s=61.0, detail="done"))
    shown = [part for part in stream.getvalue().split("\r\x1b[K") if "01:01" in part or "done" in part]
    assert "====" in shown[0] and shown[0].endswith("| 01:01")
    assert shown[-1].startswith("[compile]    done") and shown[-1].endswith("\n")


@pytest.mark.parametrize("broken", ["closed", "ascii"])
def test_a_broken_stream_is_ignored(broken):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    if broken == "closed":
        stream.close()
    console = Console(stream)
    console(events.Note(text="é"))
    console(events.Note(text="plain"))
    if broken == "ascii":
        stream.seek(0)
        assert stream.read() == "[note]       plain\n"


def test_without_any_stream_nothing_is_shown_and_nothing_fails(monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    Console()(events.Note(text="x"))


def test_stdout_stays_the_scripts_own(capsys):
    Console()(events.Note(text="x"))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "[note]       x\n"
