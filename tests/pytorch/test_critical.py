"""State always has an owner: signals at any moment, threads that read, save and train, and forks."""

import contextlib
import gc
import io
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from parity import assert_same_training, train
from small import batches, mlp, sgd, train_on
from torch import nn
from torch.nn import functional as F

import trainingcompiler as tc
from trainingcompiler.errors import FallbackError
from trainingcompiler.frameworks import pytorch
from trainingcompiler.frameworks.pytorch.interop.critical_section import CriticalSection, section
from trainingcompiler.reporting.events import FellBack

_NUMBER = signal.SIGUSR1
_OURS = os.path.dirname(pytorch.__file__)


class Pressed(BaseException):
    """What a handler raises, as Python's own does for Ctrl-C."""


@pytest.fixture
def watched():
    """A section that has taken the signals, of which the script has a handler for one."""
    before = signal.signal(_NUMBER, signal.SIG_DFL)
    section = CriticalSection()
    section.watch_signals()
    yield section
    section.unwatch_signals()
    signal.signal(_NUMBER, before)


def test_a_handler_waits_until_the_outermost_section_ends(watched):
    seen = []
    signal.signal(_NUMBER, lambda number, frame: seen.append((number, frame is not None)))
    with watched:
        with watched:
            signal.raise_signal(_NUMBER)
        assert not seen
    assert seen == [(_NUMBER, True)]
    signal.raise_signal(_NUMBER)  # outside of it at once
    assert len(seen) == 2


def test_what_a_handler_raises_arrives_and_the_section_is_left(watched):
    def press(*_):
        raise Pressed

    signal.signal(_NUMBER, press)
    done = []
    with pytest.raises(Pressed), watched:
        signal.raise_signal(_NUMBER)
        done.append(True)
    assert done and ThreadPoolExecutor(1).submit(lambda: watched.__enter__() or watched.__exit__() or True).result(10)


def test_all_handlers_run_where_one_raises(watched):
    seen = []

    def press(*_):
        raise Pressed

    other = signal.signal(signal.SIGUSR2, lambda *_: seen.append("second"))
    try:
        signal.signal(_NUMBER, press)
        with pytest.raises(Pressed), watched:
            signal.raise_signal(_NUMBER)
            signal.raise_signal(signal.SIGUSR2)
    finally:
        signal.signal(signal.SIGUSR2, other)
    assert seen == ["second"]


def test_another_librarys_patch_of_signal_survives_the_end(watched):
    ours, installed, seen = signal.signal, [], []

    def wrapped(number, handler):
        installed.append(number)
        return ours(number, handler)

    signal.signal = wrapped
    try:
        watched.unwatch_signals()
        assert signal.signal is wrapped and signal.getsignal is not watched._installed
        signal.signal(_NUMBER, lambda *_: seen.append(1))
    finally:
        signal.signal = watched._originals[0]
    with watched:  # nobody waits for it any more
        signal.raise_signal(_NUMBER)
        assert seen == [1]
    assert installed == [_NUMBER]


def test_a_signal_that_comes_twice_is_handled_once(watched):
    seen = []
    signal.signal(_NUMBER, lambda *_: seen.append(1))
    with watched:
        signal.raise_signal(_NUMBER)
        signal.raise_signal(_NUMBER)
    assert seen == [1]


def test_outside_of_the_section_handlers_run_and_others_may_enter(watched):
    seen = []
    signal.signal(_NUMBER, lambda *_: seen.append(1))
    enter = lambda: watched.__enter__() or watched.__exit__() or True  # noqa: E731
    with watched:
        signal.raise_signal(_NUMBER)
        with watched.outside():
            assert seen == [1]
            assert ThreadPoolExecutor(1).submit(enter).result(10)
        signal.raise_signal(_NUMBER)
        assert seen == [1]
    assert seen == [1, 1]


def test_a_thread_waits_for_the_section(watched):
    entered = threading.Event()

    def enter():
        with watched:
            entered.set()

    with watched:
        thread = threading.Thread(target=enter)
        thread.start()
        assert not entered.wait(0.05)  # seconds; too short a wait could only hide a fault
    thread.join()
    assert entered.is_set()


def test_a_script_finds_its_own_handlers(watched):
    def mine(*_):
        """Of the script."""

    assert signal.signal(_NUMBER, mine) is signal.SIG_DFL
    assert signal.getsignal(_NUMBER) is mine and signal.getsignal(signal.SIGINT) is not watched._arrive
    assert signal.signal(_NUMBER, signal.SIG_IGN) is mine and signal.getsignal(_NUMBER) is signal.SIG_IGN
    signal.signal(_NUMBER, mine)
    watched.unwatch_signals()
    assert signal.getsignal(_NUMBER) is mine and signal.signal.__name__ == "signal"


def test_mistakes_are_pythons(watched):
    with pytest.raises(TypeError, match="signal handler must be"):
        signal.signal(_NUMBER, "no handler")
    with pytest.raises(ValueError, match="main thread"):
        ThreadPoolExecutor(1).submit(signal.signal, _NUMBER, lambda *_: None).result(10)
    assert signal.getsignal(_NUMBER) is signal.SIG_DFL


# -- loops ------------------------------------------------------------------------------------------------------


def _small():
    torch.manual_seed(5)
    model = nn.Linear(8, 4, bias=False).double()
    return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


DATA = [(x.double(), y) for x, y in batches(8)]
_AT = 3  # the step at which the signal comes; two are past, so that it is compiled


def _trained():
    model, optimizer = _small()
    losses = train_on(model, optimizer, DATA[:_AT])
    return model, optimizer, losses


@contextlib.contextmanager
def _signal_at(call: int):
    """Sends a signal when so many functions of ours have been called; gives the count of all.

    A call is where Python looks for signals. At a line it does not: one at the end of a `with` would skip its exit.
    """
    count = [0]
    ours = (_OURS, contextlib.__file__)

    def each(frame, event, argument):
        if frame.f_code.co_filename.startswith(ours):
            count[0] += 1
            if count[0] == call:
                signal.raise_signal(_NUMBER)

    before = sys.gettrace()
    sys.settrace(each)
    try:
        yield count
    finally:
        sys.settrace(before)


def test_whatever_call_of_the_section_a_handler_raises_in_it_is_left(watched):
    def press(*_):
        raise Pressed

    @watched.around
    def work():
        with watched.outside(), watched:
            pass

    signal.signal(_NUMBER, press)
    with _signal_at(-1) as count:
        work()
    assert count[0] > 8
    for call in range(1, count[0] + 1):
        with contextlib.suppress(Pressed), _signal_at(call):
            work()
        gc.collect()  # a generator that was left behind would end now
        assert watched._depth == 0 and not watched._lock._is_owned(), call


@pytest.mark.parametrize("saves", [False, True], ids=["raises", "saves"])
def test_a_signal_at_any_call_loses_nothing(saves):
    """Whatever call of ours a signal interrupts, the model is that of before or after the step, and trains on."""
    known, losses = [], []
    model, optimizer = _small()
    for batch in DATA:
        losses += train_on(model, optimizer, [batch])
        known.append(model.weight.detach().clone())
    saved = []

    def handler(*_):
        if not saves:
            raise Pressed
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        saved.append(torch.load(io.BytesIO(file.getvalue()))["model"]["weight"])

    before = signal.signal(_NUMBER, handler)
    tc.enable(tc.TrainingCompilerConfig(engine="xla", quiet=True))
    try:
        model, optimizer, _ = _trained()
        with _signal_at(-1) as count:
            train_on(model, optimizer, DATA[_AT : _AT + 1])
        calls, hits = count[0], 0
        assert calls > 100
        for call in range(1, calls, calls // 23):  # more make more programs than are compiled of one loop
            model, optimizer, _ = _trained()
            with contextlib.suppress(Pressed), _signal_at(call):
                hits += not saves
                assert train_on(model, optimizer, DATA[_AT : _AT + 1]) == pytest.approx(losses[_AT : _AT + 1])
                hits -= not saves
            stepped = torch.allclose(model.weight, known[_AT], rtol=1e-9)
            assert stepped or (not saves and torch.allclose(model.weight, known[_AT - 1], rtol=1e-9)), call
            following = _AT + stepped
            rest = train_on(model, optimizer, DATA[following : following + 1])
            assert rest == pytest.approx(losses[following : following + 1]), call
            assert torch.allclose(model.weight, known[following], rtol=1e-9), call
    finally:
        tc.disable()
        signal.signal(_NUMBER, before)
    assert hits or len(saved) > 20
    for weight in saved:
        assert any(torch.allclose(weight, other, rtol=1e-9) for other in known[_AT - 1 : _AT + 1])


def test_a_thread_reads_losses_while_the_loop_goes_on():
    def loop(objects, data):
        model, optimizer, futures = objects["model"], objects["optimizer"], []
        with ThreadPoolExecutor(2) as pool:
            for x, y in data * 4:
                optimizer.zero_grad()
                out = model(x)
                loss = F.cross_entropy(out, y)
                futures.append(pool.submit(loss.item))
                futures.append(pool.submit(lambda out, y: (out.argmax(1) == y).sum().item(), out, y))
                loss.backward()
                futures.append(pool.submit(lambda model: model[0].weight.grad.sum().item(), model))
                futures[-1].result()
                optimizer.step()
                futures.append(pool.submit(loss.item))
        return [float(future.result()) for future in futures]

    assert_same_training(sgd(), loop, batches(12))


def test_the_thread_that_makes_the_first_step_is_the_one_that_trains():
    def loop(objects, data):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(train_on, objects["model"], objects["optimizer"], data).result()

    run = assert_same_training(sgd(), loop, batches())
    assert run.statistics.compiled_steps == 23


def test_a_second_thread_that_trains_is_torchs_and_said():
    def loop(objects, data):
        seen = train_on(objects["model"], objects["optimizer"], data)
        with ThreadPoolExecutor(1, "second") as pool:
            return [*seen, *pool.submit(train_on, objects["other"], objects["second"], data).result()]

    def make():
        model, other = mlp(), mlp()
        return {
            "model": model,
            "other": other,
            "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
            "second": torch.optim.SGD(other.parameters(), lr=0.1),
        }

    run = assert_same_training(make, loop, batches(), may_fall_back=True)
    (said,) = [event for event in run.events if isinstance(event, FellBack)]
    assert said.reason == ("thread second_0 trains while MainThread does, and the steps of one thread are compiled")
    with pytest.raises(FallbackError, match="the steps of one thread are compiled"):
        train(make, loop, batches(), compiled=True, fallback="error")


def _in_child(ask) -> list[float]:
    """What a forked child answers."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(write, repr(ask()).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return eval(text)


@pytest.mark.filterwarnings(r"ignore:.*fork:DeprecationWarning", r"ignore:os\.fork:RuntimeWarning")
def test_a_child_forked_within_a_step_sees_what_the_parent_has_asked_for():
    def loop(objects, data):
        model, optimizer, seen = objects["model"], objects["optimizer"], []
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # a child cannot use the threads of its parent
        for number, (x, y) in enumerate(data):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            if number == 9:
                seen += _in_child(lambda loss=loss: [loss.item(), model[0].weight.sum().item()])
            if number == 12:
                seen += _in_child(lambda loss=loss: loss.backward() or [model[0].weight.grad.sum().item()])
            loss.backward()
            if number == 15:
                seen += _in_child(lambda: [p.sum().item() + p.grad.sum().item() for p in model.parameters()])
            optimizer.step()
            seen.append(loss.item())
        torch.set_num_threads(threads)
        return seen

    assert_same_training(sgd(), loop, batches())


def test_a_handler_that_came_during_a_fork_waits_for_the_next_section(watched):
    seen = []
    signal.signal(_NUMBER, lambda *_: seen.append(1))
    watched.hold()
    signal.raise_signal(_NUMBER)
    watched.let_go()  # Python would drop what is raised here
    assert not seen
    with watched:
        pass
    assert seen == [1]


def test_an_exception_between_backward_and_step_leaves_the_gradients():
    def loop(objects, data):
        model, optimizer, seen = objects["model"], objects["optimizer"], []
        for number, (x, y) in enumerate(data):
            optimizer.zero_grad()
            try:
                F.cross_entropy(model(x), y).backward()
                if number == 7:
                    1 / 0  # noqa: B018
                optimizer.step()
            except ZeroDivisionError:
                seen += [p.grad.sum().item() for p in model.parameters()]
            seen += [p.sum().item() for p in model.parameters()]
        return seen

    assert_same_training(sgd(), loop, batches())


def test_a_program_runs_in_the_section(monkeypatch):
    """Nobody gets in between the consuming of the state and the storing of what became of it."""
    from trainingcompiler.compiling import compiler

    free = []

    def called(self, state, inputs, original=compiler.Executable.__call__):
        free.append(ThreadPoolExecutor(1).submit(section._lock.acquire, False).result())
        return original(self, state, inputs)

    monkeypatch.setattr(compiler.Executable, "__call__", called)
    train(sgd(), lambda objects, data: train_on(objects["model"], objects["optimizer"], data), batches(), compiled=True)
    assert free and not any(free)
