"""Whether a program fits into memory, known before it runs; and what takes most of it."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import jax

from trainingcompiler.compiling.hlo_collectives import bytes_of_dtype
from trainingcompiler.errors import NotEnoughMemoryError

_KIB = 1024
_SHOWN = 5

# An instruction of an optimized module that has a buffer of its own: its shape, its operator, and where it comes from.
_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%\S+ = (?P<dtype>\w+)\[(?P<shape>[\d,]+)\]\S* (?P<operator>[\w-]+)\("
    r'.*?(?:op_name="(?P<name>[^"]*)".*)?$'
)
_WITHOUT_BUFFER = ("parameter", "bitcast", "get-tuple-element", "constant", "iota")
_LINE = re.compile(r"(?P<line>[^/\s]+\.py:\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Buffer:
    """Arrays of one shape that one line of the script, or of a library, leads to.

    Attributes:
        size_bytes: Of one of them.
        count: How many instructions of the program make one; not all need be alive at once.
        description: Dtype and shape, `"f32[4096,50257]"`.
        where: The line, `"modeling_gpt2.py:700"`, or the operation, `"dense/MatMul"`; None where XLA does not tell.
    """

    size_bytes: int
    count: int
    description: str
    where: str | None

    def __str__(self) -> str:
        times = f"{self.count} x " if self.count > 1 else ""
        return f"{times}{size_of(self.size_bytes)}  {self.description}  {self.where or 'line not known'}"


def size_of(size_bytes: float) -> str:
    """A size as a person reads it."""
    for unit, factor in (("GiB", _KIB**3), ("MiB", _KIB**2)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.2f} {unit}"
    return f"{size_bytes / _KIB:.1f} KiB"


def largest_buffers(text: str, count: int = _SHOWN) -> list[Buffer]:
    """The largest arrays that a program makes besides its arguments.

    Args:
        text: The optimized module, as `Executable.as_text` gives it.
        count: How many to return.
    """
    found: Counter[tuple[int, str, str | None]] = Counter()
    for line in _entry(text):
        match = _INSTRUCTION.match(line)
        if match is None or match["operator"] in _WITHOUT_BUFFER or match["operator"].endswith("-done"):
            continue
        size_bytes = prod(map(int, match["shape"].split(","))) * bytes_of_dtype(match["dtype"])
        found[size_bytes, f"{match['dtype']}[{match['shape']}]", _where(match["name"] or "")] += 1
    largest = sorted(found.items(), key=lambda item: item[0][0], reverse=True)[:count]
    return [
        Buffer(size_bytes=size, count=times, description=description, where=where)
        for (size, description, where), times in largest
    ]


def _where(name: str) -> str | None:
    """A line of Python where there is one; otherwise what the framework calls the operation, `"dense/MatMul"`."""
    lines = _LINE.findall(name)
    return lines[-1] if lines else "/".join(name.split("/")[-2:]) or None


def _entry(text: str) -> list[str]:
    """The lines of the module's own computation: what is inside of a fusion has no buffer."""
    _, _, entry = text.partition("\nENTRY ")
    return entry.partition("\n}")[0].splitlines()[1:]


def available_bytes() -> int | None:
    """What this process's device could still hand out; None where nobody tells."""
    device: Any = jax.local_devices()[0]
    statistics = device.memory_stats()  # None for a CPU
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)
    return host_bytes()


def host_bytes() -> int | None:
    """What the machine could still hand out to this process; None where nobody tells."""
    known = [size for size in (_of_machine(), _of_cgroup()) if size is not None]
    return min(known, default=None)


def check(executable: Any, available: Callable[[], int | None] = available_bytes) -> None:
    """Fails if a program that has been compiled for this process cannot have the memory it plans with.

    Args:
        executable: A `compiler.Executable`. Its state and its inputs are there already.
        available: Tells what there is.

    Raises:
        NotEnoughMemoryError: It needs more.
    """
    # Devices that one processor stands for share its memory.
    needed = executable.memory.added_bytes * _devices_of_one_memory(executable.target)
    there_is = available()
    if there_is is not None and needed > there_is:
        raise NotEnoughMemoryError(
            program=executable.program.name,
            needed_bytes=needed,
            available_bytes=there_is,
            buffers=list(map(str, largest_buffers(executable.as_text()))),
        )


def _devices_of_one_memory(target: Any) -> int:
    return target.device_count if target.platform == "cpu" else 1


def _of_machine() -> int | None:
    """What Linux could give without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    values = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(values[0]) * _KIB if values else None


def _of_cgroup(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What is left of a container's limit; what its files occupy in the page cache can be had back."""
    try:
        limit = (folder / "memory.max").read_text(encoding="ascii").strip()
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return None
    if not limit.isdigit():  # "max": no limit
        return None
    return max(0, int(limit) - used + int(statistics.get("inactive_file", 0)))
