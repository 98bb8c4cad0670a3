"""The launcher for one worker on this machine."""

import subprocess
import sys

import pytest

from trainingcompiler.cli import job
from trainingcompiler.cli.job import Job
from trainingcompiler.launchers import local

MODULE = ["-m", "trainingcompiler.launch", "train.py", "-m"]


@pytest.mark.parametrize(
    ("original", "options"),
    [
        (["python", *MODULE], []),
        (["python", "-u", "-W", "error", "-X", "dev", *MODULE], ["-u", "-W", "error", "-X", "dev"]),
        (["python", "-mtrainingcompiler.launch", "train.py"], []),
        (["python", "-Oum", "trainingcompiler.launch", "train.py"], ["-Ou"]),
        (["python", "program.py"], []),
    ],
)
def test_the_interpreters_own_options_are_found(original, options):
    assert job.interpreter_options(original) == options


def test_the_process_becomes_the_worker(monkeypatch):
    started = []
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "-m", "trainingcompiler.launch", "train.py"])

    def replace(*arguments):
        started.append(arguments)
        sys.exit()  # it does not come back

    monkeypatch.setattr("os.execve", replace)
    monkeypatch.setenv("KEPT", "1")
    arguments = ("script", "train.py", "--epochs", "3")
    with pytest.raises(SystemExit):
        local.launch(Job(arguments=arguments, variables={"TRAININGCOMPILER_ENGINE": "xla"}))
    ((path, command, environment),) = started
    assert path == sys.executable
    assert command == [sys.executable, "-u", "-m", "trainingcompiler.worker", "script", "train.py", "--epochs", "3"]
    assert (environment["TRAININGCOMPILER_ENGINE"], environment["KEPT"]) == ("xla", "1")


def test_where_exec_loses_the_exit_code_the_worker_is_a_child(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr("subprocess.run", lambda command, env: subprocess.CompletedProcess(command, 7))
    with pytest.raises(SystemExit) as leaving:
        local.launch(Job(arguments=("script", "train.py")))
    assert leaving.value.code == 7


def test_launchers_import_neither_an_adapter_nor_jax():
    program = (
        "import sys, trainingcompiler.launch, trainingcompiler.launchers.torchelastic_store;"
        "print([name for name in sys.modules if name.split('.')[0] in ('jax', 'torch', 'tensorflow', 'keras', 'ray')"
        " or name.startswith('trainingcompiler.frameworks')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
