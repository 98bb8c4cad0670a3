"""What launchers say, and what they leave with."""

import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Mapping

from trainingcompiler.config import FAILURE


def say(text: str) -> None:
    """Writes one line of the launcher's own."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(f"{'[launch]':<13}{text}\n")
        sys.stderr.flush()


def described(code: int | None) -> str:
    """How a worker ended, in words."""
    if code is None:
        return "did not end by itself"
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    reason = "; often the kernel does this where memory runs out, and dmesg says so" if name == "SIGKILL" else ""
    return f"ended by {name}{reason}"


def exit_code(code: int | None) -> int:
    """What the launcher leaves with: the worker's own code, 128 and the signal's number, or 1 for what hung."""
    return 1 if not code else 128 - code if code < 0 else code


def with_threads(count: int, environ: Mapping[str, str]) -> dict[str, str]:
    """`OMP_NUM_THREADS`, for `count` workers on a host, as torchrun sets it; said aloud, and left where it is set."""
    if count < 2 or "OMP_NUM_THREADS" in environ:
        return {}
    say("OMP_NUM_THREADS=1 in each worker, as torchrun sets it; set it yourself to have another")
    return {"OMP_NUM_THREADS": "1"}


def shell_line(command: list[str], environment: Mapping[str, str]) -> str:
    """A command, with what it has in its environment and this process has not."""
    ours = {name: value for name, value in environment.items() if os.environ.get(name) != value and name != FAILURE}
    words = [f"{name}={shlex.quote(value)}" for name, value in sorted(ours.items())]
    return " ".join([*words, shlex.join(command)]) + "\n"
