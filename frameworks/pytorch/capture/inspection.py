"""The hook that `trainingcompiler.check` sets to look into one run of a compiled program, and what it is shown."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trainingcompiler.errors import CaptureError
from trainingcompiler.frameworks.pytorch.graph.ir import Graph


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """One run of a compiled program, with everything that went in and came out.

    Attributes:
        name: The program's name.
        where: The script's line.
        steps: Whether an optimizer's step is in it.
        graph: The captured graph.
        inputs: Value number to array or tensor, for every value that the program was given.
        results: Value number to array or tensor, for every value that it returned.
        names: Value number to what a person calls it, `"new 0.weight"`.
        replaced: Value number of a result to that of the input whose place it takes, for a state.
    """

    name: str
    where: str | None
    steps: bool
    graph: Graph
    inputs: Mapping[int, Any]
    results: Mapping[int, Any]
    names: Mapping[int, str]
    replaced: Mapping[int, int] = field(default_factory=dict)


inspector: Callable[[Inspection], None] | None = None
"""Is shown every run of a program that was compiled while it was set; copies of all arrays are made for it."""

missing: list[CaptureError] | None = None
"""While it is a list, recording notes operators without a lowering there and goes on; capture fails at its end."""
