"""Runs commands, each in a fork of a process that has torch and JAX already: `python forks.py`, one a line, as JSON.

Importing takes longer than what most scripts do. A command is `{"script": path}`, as `python path`; with `options` it
is `python -m trainingcompiler.launch options... path`, whose worker then runs in the fork in place of a new process.
What it prints goes to `<path>.out` and `<path>.err`; its exit code is the answer.
"""

import json
import os
import runpy
import sys
import traceback
from unittest import mock

import jax  # noqa: F401 - no backend is started: a fork could not use it
import jax.numpy  # noqa: F401
import torch
import torch._dynamo  # noqa: F401 - torch itself imports it, at the first optimizer: seconds

import trainingcompiler.frameworks.pytorch.session.session  # noqa: F401 - which patches nothing


def run(script: str, options: list[str] | None = None, environment: dict[str, str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        for name, number in ((f"{script}.out", 1), (f"{script}.err", 2)):
            os.dup2(os.open(name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
        os.environ.update(environment or {})
        if options is None:
            sys.argv[:], sys.path[0] = [script], os.path.dirname(script)
            runpy.run_path(script, run_name="__main__")
        else:
            with mock.patch.object(os, "execve", _worker):
                sys.argv[:] = ["launch", *options, script]
                runpy.run_module("trainingcompiler.launch", run_name="__main__")
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _worker(_: str, command: list[str], environment: dict[str, str]) -> None:
    """What the launcher becomes: `python -m trainingcompiler.worker script path`."""
    os.environ.clear()
    os.environ.update(environment)
    module = command.index("-m") + 1
    sys.argv[:] = command[module:]
    runpy.run_module(command[module], run_name="__main__", alter_sys=True)
    raise SystemExit(0)


if __name__ == "__main__":
    torch.ones(1).sum()  # its libraries are there
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for line in sys.stdin:
        answers.write(f"{run(**json.loads(line))}\n")
