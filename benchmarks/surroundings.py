"""What a start is given, so that it is timed and not the machine: the environment, and memory that is really there."""

import os
import subprocess
import sys
from collections.abc import Mapping

from trainingcompiler.processes import rendezvous
from trainingcompiler.targets import huge_pages

_TOUCHED_BYTES = 8 * 10**9


def environment(**variables: str) -> Mapping[str, str]:
    """The variables for a process that is timed.

    It asks for huge pages, as the launcher has it do, and keeps Python's bytecode, as installed packages do.
    """
    given = {**os.environ, **huge_pages.variables(os.environ), **variables}
    rendezvous.share_gpus(given)
    given.pop("PYTHONDONTWRITEBYTECODE", None)
    return given


def touch_memory() -> None:
    """Has the system touch the memory that a start will need.

    A virtual machine lends memory that nobody uses to others. Getting 10 GB back took 22 s on the machine of the
    results, and 0.4 s right afterwards: whoever starts next would pay for it, whatever it is.
    """
    count = min(_TOUCHED_BYTES, _free_bytes() // 2)
    code = f"import numpy as np\na = np.zeros({count}, np.uint8)\na[::4096] = 1"
    subprocess.run([sys.executable, "-c", code], check=True)


def _free_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
