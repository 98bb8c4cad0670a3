"""Starts one worker on this machine, in place of the launcher itself."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

WORKER = "trainingcompiler.worker"

# The interpreter's short options without a value may share a word with the -m that ends them, as in `python -um x`.
_MODULE_OPTION = re.compile(r"-(?P<others>[bBdEiIOPqsSuvx]*)m")


def launch(arguments: Sequence[str], variables: Mapping[str, str]) -> NoReturn:
    """Becomes the worker.

    Args:
        arguments: The worker's own arguments (see `trainingcompiler.worker`).
        variables: Added to the environment.
    """
    command = [sys.executable, *interpreter_options(sys.orig_argv), "-m", WORKER, *arguments]
    environment = {**os.environ, **variables}
    sys.stdout.flush()
    sys.stderr.flush()
    if sys.platform == "win32":  # its exec returns to the shell at once, without the exit code
        sys.exit(subprocess.run(command, env=environment).returncode)
    # Exec, not a child: the script then owns the process id, the signals, the terminal and the exit code, as it would
    # without a launcher, and nothing is left in between that could fail to pass one on.
    os.execve(sys.executable, command, environment)


def interpreter_options(original: Sequence[str]) -> list[str]:
    """Returns the options `python` itself was given (`-u`, `-W error`, ...) in `original`, a `sys.orig_argv`."""
    options: list[str] = []
    for argument in original[1:]:
        found = _MODULE_OPTION.match(argument)
        if found:
            return [*options, *([f"-{found['others']}"] if found["others"] else [])]
        options.append(argument)
    return []
