"""What a script began with is loaded before it asks for it; whatever goes wrong there, it is loaded when it asks."""

import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from trainingcompiler.cache import prefetch as module
from trainingcompiler.cache.prefetch import LIST, ExecutablePrefetcher


@pytest.fixture(autouse=True)
def script(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__file__=str(tmp_path / "train.py")))


def entry(folder, name):
    path = folder / name
    path.write_bytes(name.encode())
    return path


def loading(folder, load=lambda path: path.read_text(), surroundings=("cpu",)) -> ExecutablePrefetcher:
    ahead = ExecutablePrefetcher(folder, surroundings, load)
    ahead.begin()
    return ahead


def test_the_next_run_has_ready_what_this_one_used(tmp_path):
    one, two, three = (entry(tmp_path, name) for name in ("one", "two", "three"))
    first = loading(tmp_path)
    assert first.take(one) is None
    for path in (one, two, one):
        first.used(path)
    threads, last = set(), threading.Event()

    def load(path):
        threads.add(threading.current_thread())
        if path == two:
            last.set()
        return path.read_text()

    second = loading(tmp_path, load)
    assert last.wait(60)
    assert [second.take(one), second.take(two), second.take(three)] == ["one", "two", None]
    assert second.take(one) is None  # it is the taker's alone
    assert len(threads) == 1 and threading.main_thread() not in threads


def test_a_few_programs_are_enough(tmp_path):
    first = loading(tmp_path)
    paths = [entry(tmp_path, f"entry-{number}") for number in range(7)]
    for path in paths:
        first.used(path)
    loaded, fourth = [], threading.Event()

    def load(path):
        loaded.append(path)
        if path == paths[3]:
            fourth.set()

    second = loading(tmp_path, load)
    assert fourth.wait(60)
    second.end()
    assert loaded == paths[:4]


def test_other_scripts_and_other_surroundings_have_beginnings_of_their_own(tmp_path, monkeypatch):
    one = entry(tmp_path, "one")
    loading(tmp_path).used(one)
    assert loading(tmp_path, surroundings=("cuda",)).take(one) is None
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__file__=str(tmp_path / "other.py")))
    assert loading(tmp_path).take(one) is None


def test_at_a_prompt_nothing_is_noted(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace())
    one = entry(tmp_path, "one")
    loading(tmp_path).used(one)
    assert not list(tmp_path.glob(f"*{LIST}")) and loading(tmp_path).take(one) is None


def test_a_wait_is_for_one_that_is_being_loaded_and_not_for_those_before_it(tmp_path):
    one, two = entry(tmp_path, "one"), entry(tmp_path, "two")
    first = loading(tmp_path)
    first.used(one)
    first.used(two)
    begun, go_on = threading.Event(), threading.Event()

    def slow(path):
        begun.set()
        assert go_on.wait(60)
        return path.read_text()

    second = loading(tmp_path, slow)
    assert begun.wait(60)
    assert second.take(two) is None  # not begun: whoever takes it is faster alone
    threading.Timer(0.1, go_on.set).start()
    assert second.take(one) == "one"


@pytest.mark.parametrize("list_text", ["gone\n", "../../etc/passwd\n", "\n", b"\xff\xfe"])
def test_a_list_that_means_nothing_does_no_harm(tmp_path, list_text):
    one = entry(tmp_path, "one")
    loading(tmp_path).used(one)
    (path,) = tmp_path.glob(f"*{LIST}")
    path.write_bytes(list_text.encode() if isinstance(list_text, str) else list_text)
    again = loading(tmp_path, lambda path: pytest.fail(f"{path} was loaded"))
    assert again.take(one) is None
    again.end()


def test_what_cannot_be_loaded_is_left_to_whoever_asks(tmp_path):
    one = entry(tmp_path, "one")
    loading(tmp_path).used(one)

    def broken(path):
        raise ValueError("damaged")

    assert loading(tmp_path, broken).take(one) is None


def test_a_full_disk_costs_the_next_run_its_start_only(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_whole", full)
    loading(tmp_path).used(entry(tmp_path, "one"))
    assert not list(tmp_path.glob(f"*{LIST}"))


@pytest.mark.filterwarnings("ignore:os.fork")  # JAX's, where another test has started it
def test_a_fork_waits_for_what_is_being_loaded(tmp_path):
    one, two = entry(tmp_path, "one"), entry(tmp_path, "two")
    first = loading(tmp_path)
    first.used(one)
    first.used(two)
    begun, loaded = threading.Event(), []

    def slow(path):
        begun.set()
        time.sleep(0.2)
        loaded.append(path.name)
        return path.name

    second = loading(tmp_path, slow)
    assert begun.wait(60)
    child = os.fork()
    if not child:
        os._exit(0 if loaded == ["one"] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert second.take(one) == "one" and second.take(two) is None


def test_a_script_that_ends_at_once_waits_for_one_entry_only(tmp_path):
    """As `--help` does, which comes after the imports."""
    script = tmp_path / "ends.py"
    script.write_text(
        "import threading, time\n"
        "from pathlib import Path\n"
        "from trainingcompiler.cache.prefetch import ExecutablePrefetcher\n"
        "begun = threading.Event()\n"
        "def load(path):\n"
        "    begun.set()\n"
        "    while threading.main_thread().is_alive():\n"
        "        time.sleep(0.01)\n"
        "    path.with_name(path.name + ' loaded').touch()\n"
        f"ahead = ExecutablePrefetcher(Path({str(tmp_path)!r}), (), load)\n"
        "ahead.begin()\n"
        "if ahead._listed():\n"
        "    begun.wait()\n"
        "for name in ('one', 'two', 'three'):\n"
        f"    ahead.used(Path({str(tmp_path)!r}) / name)\n"
    )
    for name in ("one", "two", "three"):
        entry(tmp_path, name)
    for _ in range(2):
        subprocess.run([sys.executable, str(script)], check=True, timeout=60)
    assert [path.name for path in tmp_path.glob("* loaded")] == ["one loaded"]
