"""Runs scripts plainly, each in a fork of a process that has torch already: `python plain.py`, one path a line.

What a script prints goes to `<path>.out` and `<path>.err`; its exit code is the answer.
"""

import os
import runpy
import sys
import traceback

import torch


def run(path: str) -> int:
    """Runs one script as `python path` does; returns its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        for name, number in ((f"{path}.out", 1), (f"{path}.err", 2)):
            os.dup2(os.open(name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
        sys.argv[:], sys.path[0] = [path], os.path.dirname(path)
        runpy.run_path(path, run_name="__main__")
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    torch.ones(1).sum()  # its libraries are there
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for line in sys.stdin:
        answers.write(f"{run(line.rstrip())}\n")
