"""The launcher and its worker as processes: what a script sees of them, which is nothing."""

import os
import signal
import subprocess
import sys

import pytest

from trainingcompiler import config
from trainingcompiler.reporting.console import NOTHING_TRAINED

STEP = "from trainingcompiler.reporting import statistics; statistics.current().step_finished('xla', 1.0)\n"
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="processes and signals of POSIX")


@pytest.fixture
def folder(tmp_path):
    return tmp_path


def python(folder, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if name not in config.VARIABLES.values()}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env={**environ, **variables}, capture_output=True, text=True, timeout=120
    )


def launch(folder, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return python(folder, "-m", "trainingcompiler.launch", *words, **variables)


def write(folder, name: str, source: str):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    return path


DESCRIBE = """
import os, sys, pickle
def function(): pass
print(__name__, __file__, __package__, __spec__ and __spec__.name, __doc__, type(__loader__).__name__)
print(type(__builtins__), sys.argv, sys.path[0], os.getcwd(), sys.modules["__main__"].function is function)
print(pickle.loads(pickle.dumps(function)) is function)
"""


@pytest.mark.parametrize("words", [["part/describe.py", "a", "--b", ""], ["-m", "part.describe", "x"], ["-m", "part"]])
def test_a_script_sees_what_it_sees_without_us(folder, words):
    write(folder, "part/describe.py", DESCRIBE)
    write(folder, "part/__init__.py", "")
    write(folder, "part/__main__.py", DESCRIBE)
    plain, ours = python(folder, *words), launch(folder, "--no-compile", *words)
    assert plain.returncode == ours.returncode == 0
    assert ours.stdout == plain.stdout
    assert plain.stdout.startswith("__main__ ")


def test_nothing_heavy_is_imported_for_a_script_that_imports_nothing(folder):
    write(
        folder,
        "hello.py",
        "import sys; print([name for name in ('jax', 'torch', 'tensorflow', 'numpy') if name in sys.modules])",
    )
    assert launch(folder, "hello.py").stdout == "[]\n"


def test_a_script_that_trains_nothing_is_told_so_at_the_end(folder):
    write(folder, "hello.py", "print('hello')")
    done = launch(folder, "hello.py")
    assert (done.returncode, done.stdout) == (0, "hello\n")
    assert done.stderr == f"[nothing]    {NOTHING_TRAINED}\n"
    assert launch(folder, "--quiet", "hello.py").stderr == done.stderr
    refused = launch(folder, "--fallback=error", "hello.py")
    assert (refused.returncode, refused.stderr) == (2, done.stderr)


@pytest.mark.parametrize(("options", "variables"), [(["--no-compile"], {}), ([], {"TRAININGCOMPILER": "0"})])
def test_turned_off_the_script_is_run_as_it_is(folder, options, variables):
    write(folder, "hello.py", "print('hello')")
    done = launch(folder, *options, "hello.py", **variables)
    assert (done.returncode, done.stdout) == (0, "hello\n")
    assert done.stderr.endswith("compiled: no because --no-compile or TRAININGCOMPILER=0 says so\n")
    assert done.stderr.count("\n") == 1


def test_a_script_that_trains_ends_with_the_summary(folder):
    write(folder, "train.py", STEP)
    done = launch(folder, "train.py")
    assert done.returncode == 0
    assert done.stderr.startswith("[done]       1 step, ")
    assert done.stderr.count("\n") == 1
    assert launch(folder, "--quiet", "train.py").stderr == ""


@pytest.mark.parametrize("leave", ["sys.exit(3)", "sys.exit('said at the end')", "sys.exit()", "1 / 0"])
def test_exit_codes_and_last_words_are_the_scripts(folder, leave):
    write(folder, "train.py", f"import sys\n{STEP}{leave}\n")
    plain, ours = python(folder, "train.py"), launch(folder, "train.py")
    summary, _, rest = ours.stderr.partition("\n")
    assert ours.returncode == plain.returncode
    assert summary.startswith("[done]")
    assert rest == plain.stderr


CHAINED = """
def inner():
    raise KeyError("cause")
def outer():
    try:
        inner()
    except KeyError as error:
        raise ValueError("effect") from error
outer()
"""


@pytest.mark.parametrize("source", [CHAINED, "x = = 1\n", "import json\njson.loads('{')\n"])
def test_tracebacks_are_pythons_own(folder, source):
    write(folder, "train.py", source)
    plain, ours = python(folder, "train.py"), launch(folder, "train.py")
    assert ours.returncode == plain.returncode == 1
    assert ours.stderr == plain.stderr


def test_a_scripts_own_excepthook_gets_the_scripts_traceback(folder):
    write(
        folder,
        "train.py",
        "import sys, traceback\n"
        "def hook(kind, error, trace):\n"
        "    print(kind.__name__, [frame.name for frame in traceback.extract_tb(trace)])\n"
        "sys.excepthook = hook\n"
        "def fail(): raise ValueError\n"
        "fail()\n",
    )
    done = launch(folder, "train.py")
    assert (done.returncode, done.stdout) == (1, "ValueError ['<module>', 'fail']\n")


@POSIX
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_signals_end_the_script_as_they_do_without_us(folder, number):
    write(folder, "train.py", f"import os, signal\nos.kill(os.getpid(), signal.{number})\nsignal.pause()\n")
    plain, ours = python(folder, "train.py"), launch(folder, "train.py")
    assert ours.returncode == plain.returncode == -getattr(signal, number)
    assert ours.stderr == plain.stderr


@POSIX
def test_a_forked_child_does_not_sum_up_again(folder):
    write(folder, "train.py", f"import os, sys\n{STEP}if os.fork() == 0: sys.exit(0)\nos.wait()\n")
    assert launch(folder, "train.py").stderr.count("[done]") == 1


@pytest.mark.parametrize("words", [["train.py"], ["-m", "train"]])
def test_spawned_children_work_and_are_not_compiled(folder, words):
    write(
        folder,
        "train.py",
        "import multiprocessing, sys\n"
        "def work(number):\n"
        "    return number * 2, __name__, 'trainingcompiler' in sys.modules\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.map(work, [21]))\n",
    )
    done = launch(folder, *words)
    assert done.stdout == "[(42, '__mp_main__', False)]\n"
    assert done.stderr == f"[nothing]    {NOTHING_TRAINED}\n"


def test_the_interpreters_options_reach_the_script(folder):
    write(folder, "train.py", "import sys; print(sys.flags.optimize, sys.warnoptions, sys.stdout.write_through)")
    words = ["-u", "-O", "-W", "error"]
    plain = python(folder, *words, "train.py")
    assert python(folder, *words, "-m", "trainingcompiler.launch", "train.py").stdout == plain.stdout


@pytest.mark.parametrize("name", ["nowhere", "nowhere.train", "part"])
def test_a_module_that_does_not_exist(folder, name):
    write(folder, "part/__init__.py", "")
    done = launch(folder, "-m", name)
    assert done.returncode == 2
    assert done.stderr.startswith(f"trainingcompiler: there is no module {name}")
    assert done.stderr.count("\n") == 1


def test_an_import_that_fails_inside_the_module_is_the_scripts_error(folder):
    write(folder, "part/__init__.py", "import missing_dependency\n")
    write(folder, "part/train.py", "")
    done = launch(folder, "-m", "part.train")
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == "Traceback (most recent call last):"
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'missing_dependency'"
    assert "worker.py" not in done.stderr


def test_bad_input_has_exit_code_2(folder):
    for words, said in [(["missing.py"], "there is no script missing.py"), (["--engin", "x"], "did you mean --engine")]:
        done = launch(folder, *words)
        assert (done.returncode, done.stdout) == (2, "")
        assert said in done.stderr
