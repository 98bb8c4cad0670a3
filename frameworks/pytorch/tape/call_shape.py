"""The record of what one call returns: shapes, dtypes, views and writes. `capture.eval_shape` makes it."""

import functools
from dataclasses import dataclass
from typing import Any

import torch

from trainingcompiler.frameworks.pytorch.interop.pytree import TreeDef
from trainingcompiler.frameworks.pytorch.tape.entries import Geometry


@dataclass(frozen=True)
class CallShape:
    """What a call returns.

    Attributes:
        structure: Of the result.
        leaves: The result's leaves: an `Output`, an `Argument`, or the value itself.
        metas: A fake tensor for each distinct tensor that the call makes.
        geometries: Theirs.
        fresh: Which of the result's distinct tensors those are.
        writes: Positions of the leaves that the call writes to.
        views: For each of `metas` the position of the leaf whose memory it shares; -1 for none.
        has_views: Whether any of `metas` shares memory with a leaf.
        random: Whether the call draws random numbers.
        gains: Positions of the leaves that it writes to and that have a gradient history only since.
        is_single: Whether it returns one new tensor, and nothing else.
    """

    structure: TreeDef
    leaves: tuple[Any, ...]
    metas: tuple[torch.Tensor, ...]
    geometries: tuple[Geometry, ...]
    fresh: tuple[int, ...]
    writes: tuple[int, ...]
    views: tuple[int, ...]
    has_views: bool
    random: bool
    gains: tuple[int, ...]
    is_single: bool

    @functools.cached_property
    def is_plain(self) -> bool:
        """Whether it returns one new tensor, and does nothing else."""
        return self.is_single and not (self.random or self.writes)

    @functools.cached_property
    def is_nothing(self) -> bool:
        """Whether it hands back arguments, and does nothing else: `x.cpu()` of what is there, a cast to its dtype."""
        hands_back = any(isinstance(leaf, Argument) for leaf in self.leaves)
        return hands_back and not (self.metas or self.random or self.writes)


@dataclass(frozen=True, slots=True)
class Output:
    """The call's `index`-th tensor."""

    index: int


@dataclass(frozen=True, slots=True)
class Argument:
    """The tensor that the call got as its leaf number `position`."""

    position: int
