"""What devices send each other in a step: read off the compiled program."""

import math
import re
from dataclasses import dataclass

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_LINE = re.compile(rf" = (?P<result>.*?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\(")
_ARRAY = re.compile(r"\b(?P<dtype>pred|[suf]\d+|bf16|c\d+)\[(?P<shape>[\d,]*)\]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Collective:
    """All collectives of one kind in a step.

    Attributes:
        kind: As XLA calls it.
        count: How many there are.
        size_bytes: Of the whole arrays that they gather, add up or scatter, together: about what every device receives.
    """

    kind: str
    count: int
    size_bytes: int


def collectives(text: str, devices: int) -> tuple[Collective, ...]:
    """The collectives of an optimized program.

    Args:
        text: As `Executable.as_text` gives it. An asynchronous collective is counted where it starts.
        devices: How many take part.
    """
    found: dict[str, list[int]] = {}
    for line in text.splitlines():
        match = _LINE.search(line)
        if match:
            found.setdefault(match["kind"], []).append(_whole(match, devices))
    return tuple(
        Collective(kind=kind, count=len(found[kind]), size_bytes=sum(found[kind])) for kind in KINDS if kind in found
    )


def _whole(match: re.Match, devices: int) -> int:
    """Bytes of the larger side: what is gathered is whole in the result, what is scattered in the operands.

    The text does not show operands, but where a collective starts: there the result is both of them, one after the
    other. Only an all-reduce, whose sides are alike, has one there too.
    """
    sizes = [_size(array) for array in _ARRAY.finditer(match["result"])]
    if match["start"] and match["kind"] != "all-reduce":
        half = len(sizes) // 2
        return max(sum(sizes[:half]), sum(sizes[half : 2 * half]))
    return sum(sizes) * (devices if match["kind"] == "reduce-scatter" else 1)


def _size(array: re.Match) -> int:
    elements = math.prod(int(length) for length in array["shape"].split(",") if length)
    return elements * bytes_of_dtype(array["dtype"])


def bytes_of_dtype(name: str) -> int:
    """Bytes of one element, by XLA's name of its dtype: `"pred"`, `"bf16"`, `"s64"`, `"f8e4m3fn"`."""
    bits = re.search(r"\d+", name)
    return max(1, int(bits[0]) // 8) if bits else 1
