"""Huge pages for the memory of compiled steps.

XLA:CPU takes a step's temporaries from the system and gives them back, at every step. With pages of 4 kB the kernel
then clears and maps them one by one: 34,000 page faults and 20 of 100 ms for a step with 133 MB of them (a GPT with 3M
parameters, two cores), 400 and 1 ms with pages of 2 MB. Where the kernel gives these to those who ask (`madvise`, the
default of most), glibc asks if a variable says so when the process starts.
https://www.gnu.org/software/libc/manual/html_node/Memory-Allocation-Tunables.html
https://docs.kernel.org/admin-guide/mm/transhuge.html
"""

import sys
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "GLIBC_TUNABLES"
_TUNABLE = "glibc.malloc.hugetlb"
_KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that make a process started with `environ` ask for huge pages.

    Args:
        environ: Its environment. What it says about them itself holds.

    Returns:
        Name -> value; empty where asking changes nothing.
    """
    given = environ.get(VARIABLE, "")
    if _policy() != "madvise" or _TUNABLE in given:
        return {}
    return {VARIABLE: ":".join(filter(None, [given, f"{_TUNABLE}=1"]))}


def described(environ: Mapping[str, str]) -> str:
    """What a person calls the pages of a process started with `environ`: "huge pages", "small pages"; "" if unknown."""
    policy = _policy()
    if not policy:
        return ""
    tunables = dict(pair.partition("=")[::2] for pair in environ.get(VARIABLE, "").split(":"))
    asks = tunables.get(_TUNABLE, "0") != "0"
    return "huge pages" if policy == "always" or (policy == "madvise" and asks) else "small pages"


def _policy() -> str:
    """The kernel's word in use, of "always [madvise] never"."""
    if sys.platform != "linux":
        return ""
    try:
        words = _KERNEL.read_text(encoding="ascii").split()
    except OSError:
        return ""
    return next((word.strip("[]") for word in words if word.startswith("[")), "")
