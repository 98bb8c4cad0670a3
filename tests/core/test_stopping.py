"""One step for all: whoever is told, wherever the others are, and whatever they wait for meanwhile."""

import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest

import trainingcompiler as tc
from trainingcompiler.errors import TrainingCompilerError, UsageError
from trainingcompiler.parallel import stop_signal
from trainingcompiler.processes import rendezvous
from trainingcompiler.processes.cluster_env import Worker
from trainingcompiler.reporting import events

LIMIT_S = 60  # only against hanging


class Store:
    """What JAX's store of keys does, in one process."""

    def __init__(self):
        self.values: dict[str, str] = {}
        self.refusals = 0

    def key_value_set(self, key, value, allow_overwrite=False):
        if self.refusals:
            self.refusals -= 1
            raise RuntimeError("unavailable")
        self.values[key] = value

    def key_value_dir_get(self, prefix):
        return [(key, value) for key, value in list(self.values.items()) if key.startswith(prefix)]


@pytest.fixture(autouse=True)
def _nothing_is_left_for_the_next():
    yield
    stop_signal._unanswered = ""


@pytest.fixture
def store(monkeypatch):
    monkeypatch.setattr(stop_signal, "POLL_S", 0.02)
    kept = Store()
    monkeypatch.setattr(rendezvous, "store", lambda: kept)
    return kept


@pytest.fixture
def worker_signals(store, monkeypatch):
    """Makes a StopSignal for each of `count` workers; that of rank 0 can be told alone."""
    made = []

    def make(count):
        for rank in range(count):
            worker = Worker(rank=rank, world_size=count, local_rank=rank, local_world_size=count)
            monkeypatch.setattr(rendezvous, "current", lambda worker=worker: worker)
            monkeypatch.setattr(stop_signal, "_numbers", itertools.count(1))
            made.append(tc.StopSignal())
        return made

    yield make
    for stop in reversed(made):
        stop.close()


@pytest.fixture
def alone():
    with tc.StopSignal() as stop:
        yield stop


def in_threads(functions):
    """Runs functions as workers' main threads; returns what they return."""
    results = [None] * len(functions)

    def run(number):
        results[number] = functions[number]()

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert not any(thread.is_alive() for thread in threads), "workers wait for each other for ever"
    return results


def first_yes(stop, step=lambda: None, limit=100_000):
    return next((call for call in range(1, limit + 1) if step() or stop.requested()), None)


@pytest.mark.parametrize("seed", range(3))
def test_all_workers_are_told_at_the_same_call(seed, worker_signals):
    chance = random.Random(seed)
    stops = worker_signals(3)
    timer = threading.Event()

    def loop(stop, pace):
        return lambda: first_yes(stop, lambda: timer.wait(pace))

    paces = [chance.uniform(0.0001, 0.01) for _ in stops]
    threading.Timer(chance.uniform(0, 0.2), stops[0]._arrived, (signal.SIGTERM, None)).start()
    calls = in_threads([loop(stop, pace) for stop, pace in zip(stops, paces, strict=True)])
    assert calls[0] is not None and len(set(calls)) == 1, calls
    assert all(stop.requested() for stop in stops)
    assert {stop.reason for stop in stops} == {"SIGTERM at rank 0"}


def test_a_worker_may_wait_for_the_others_in_its_step(worker_signals):
    # Its main thread then says nothing, as in an all-reduce: the one that is told has gone on to its next call.
    stops = worker_signals(3)
    meeting = threading.Barrier(3)
    threading.Timer(0.1, stops[0]._arrived, (signal.SIGUSR1, None)).start()

    def step():
        meeting.wait(LIMIT_S)

    calls = in_threads([lambda stop=stop: first_yes(stop, step) for stop in stops])
    assert calls[0] is not None and len(set(calls)) == 1, calls


def test_a_store_that_does_not_answer_once_is_asked_again(worker_signals, store):
    stops = worker_signals(2)
    store.refusals = 5
    stops[0]._arrived(signal.SIGTERM, None)
    calls = in_threads([lambda stop=stop: first_yes(stop, lambda: time.sleep(0.001)) for stop in stops])
    assert calls[0] is not None and len(set(calls)) == 1


def test_a_worker_whose_loop_has_ended_keeps_nobody_waiting(worker_signals, monkeypatch):
    stops = worker_signals(2)
    assert not any(stops[1].requested() for _ in range(5))
    stops[1].close()
    stops[0]._arrived(signal.SIGTERM, None)
    assert not any(stops[0].requested() for _ in range(5))  # its own loop ends here as well
    stops[0].close()
    monkeypatch.setattr(rendezvous, "current", lambda: None)
    with tc.StopSignal() as following:
        assert following.requested() and following.reason == "SIGTERM"


def test_who_does_not_say_where_it_is_is_named(store, monkeypatch):
    monkeypatch.setattr(stop_signal, "WAIT_S", 0.2)
    worker = Worker(rank=0, world_size=3, local_rank=0, local_world_size=3)
    monkeypatch.setattr(rendezvous, "current", lambda: worker)
    with tc.StopSignal() as stop:
        stop._arrived(signal.SIGTERM, None)
        with pytest.raises(TrainingCompilerError) as caught:
            first_yes(stop, limit=10**9)
    assert "rank 1, 2 of 3 has not said within 0 s how far it is" in str(caught.value)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_alone_the_next_call_is_the_one(alone, number):
    assert not alone.requested() and alone.reason == ""
    os.kill(os.getpid(), number)
    assert alone.requested() and alone.requested()
    assert alone.reason == signal.Signals(number).name


def test_a_handler_of_the_scripts_own_is_called_as_well_and_given_back():
    seen = []

    def own(number, frame):
        seen.append(number)

    before = signal.signal(signal.SIGUSR1, own)
    try:
        stop = tc.StopSignal()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.requested() and seen == [signal.SIGUSR1]
        stop.close()
        assert signal.getsignal(signal.SIGUSR1) is own and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_leaving_says_why_and_asks_to_be_started_again(alone):
    told: list[events.Event] = []
    withdraw = events.subscribe(told.append)
    os.kill(os.getpid(), signal.SIGTERM)
    alone.requested()
    with pytest.raises(SystemExit) as left:
        alone.exit()
    withdraw()
    assert left.value.code == tc.REQUEUE == 75
    assert told == [
        events.Stopped(text="SIGTERM: stopped after 1 steps of this run, leaving with exit code 75 to be started again")
    ]


def test_another_thread_can_make_none():
    def make():
        with pytest.raises(UsageError) as caught:
            tc.StopSignal()
        return str(caught.value)

    (said,) = in_threads([make])
    assert "Python hands signals to the main thread only; make the StopSignal there" in said


def test_workers_of_others_can_make_none(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError) as caught:
        tc.StopSignal()
    assert "WORLD_SIZE=2, and these workers were not started with trainingcompiler" in str(caught.value)
    assert "python -m trainingcompiler.launch --nproc-per-node=N train.py" in str(caught.value)


def test_a_closed_one_is_not_asked():
    with tc.StopSignal() as stop:
        pass
    stop.close()
    with pytest.raises(UsageError, match="on a tc.StopSignal that is closed; make another one for this loop"):
        stop.requested()


FORKING = """
import os, signal, sys, time
import trainingcompiler as tc

stop = tc.StopSignal()
found = []
for number in (signal.SIGTERM, signal.SIGUSR1):
    child = os.fork()
    if not child:
        os.kill(os.getpid(), number)
        os._exit(7)
    found.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(found, stop.requested())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_children_end_as_they_did():
    done = subprocess.run([sys.executable, "-c", FORKING], capture_output=True, text=True, timeout=LIMIT_S)
    assert done.stdout == f"[{-signal.SIGTERM}, 7] False\n", done.stderr
