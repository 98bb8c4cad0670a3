"""What a run of a compiled program shows to whoever wants to look into it, as `trainingcompiler.check` does."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from trainingcompiler.errors import CaptureError
from trainingcompiler.frameworks.pytorch.graph import Graph


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """One run of a compiled program, with everything that went in and came out.

    Attributes:
        name: The program's name.
        where: The script's line.
        steps: Whether an optimizer's step is in it.
        graph: The captured graph.
        inputs: Value number to array, for every value that the program was given.
        results: Value number to array, for every value that it returned.
        names: Value number to what a person calls it, `"new 0.weight"`.
    """

    name: str
    where: str | None
    steps: bool
    graph: Graph
    inputs: dict[int, np.ndarray]
    results: dict[int, np.ndarray]
    names: dict[int, str]


inspector: Callable[[Inspection], None] | None = None
"""Is shown every run of a program that was compiled while it was set; copies of all arrays are made for it."""

missing: list[CaptureError] | None = None
"""While it is a list, recording notes operators without a lowering there and goes on; capture fails at its end."""
