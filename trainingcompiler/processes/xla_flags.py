"""`XLA_FLAGS`, which XLA reads once per process, and which ends the process where it does not know one."""

import difflib
import mmap
import re
import subprocess
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from trainingcompiler.errors import UsageError

VARIABLE = "XLA_FLAGS"
_UNKNOWN = re.compile(r"Unknown flags? in XLA_FLAGS: *(?P<flags>.*)")
# Reads the flags as a backend does, without starting one: 0.1 s.
_READ_FLAGS = "from jaxlib import xla_client; xla_client.CompileOptions()"
_NAME = re.compile(rb"\0(xla_[a-z0-9_]+)(?=\0)")
_TIMEOUT_S = 60


def append(environ: MutableMapping[str, str], flags: Sequence[str]) -> None:
    """Adds flags to those that are set; one that the person has set already is left as it is.

    Args:
        environ: The environment, before JAX has started a backend.
        flags: Such as `"--xla_gpu_enable_latency_hiding_scheduler=true"`.
    """
    given = environ.get(VARIABLE, "").split()
    names = {flag.partition("=")[0] for flag in given}
    added = [flag for flag in flags if flag.partition("=")[0] not in names]
    if added:
        environ[VARIABLE] = " ".join([*given, *added])


def check(environ: Mapping[str, str]) -> None:
    """Has the installed XLA read the flags, in a process of its own.

    Raises:
        UsageError: It does not know one, or cannot read its value.
    """
    flags = environ.get(VARIABLE, "")
    if not flags.strip():
        return
    command = [sys.executable, "-c", _READ_FLAGS]
    done = subprocess.run(command, env=dict(environ), capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode == 0:
        return
    found = _UNKNOWN.search(done.stderr)
    if found is None:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        raise UsageError(f"{VARIABLE}={flags}: the installed XLA does not accept it: {lines[0]}")
    unknown = found["flags"].split()
    hints = [hint for hint in map(_closest, unknown) if hint]
    hint = f" (did you mean {', '.join(hints)}?)" if hints else ""
    raise UsageError(
        f"{VARIABLE} has {' '.join(unknown)}, which the installed XLA does not know{hint}, and which would end the "
        "process: take it out"
    )


def _closest(flag: str) -> str:
    name = flag.lstrip("-").partition("=")[0]
    matches = difflib.get_close_matches(name, _known(), n=1, cutoff=0.8)
    return f"--{matches[0]}" if matches else ""


def _known() -> set[str]:
    """What may be names of flags: the texts in XLA's library that look like one."""
    spec = find_spec("jaxlib")
    if spec is None or spec.origin is None:
        return set()
    found: set[str] = set()
    for library in Path(spec.origin).parent.glob("libjax_common.*"):
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            found.update(name.decode() for name in _NAME.findall(content))
    return found
