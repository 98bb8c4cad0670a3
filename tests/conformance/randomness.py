"""Compares operators that draw random numbers by the distribution of their results."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from comparison import TOLERANCES
from trial import Trial

from trainingcompiler.frameworks.pytorch.interop.arrays import tensor_of

_DRAWS = 300
_SIGMAS = 6.0
"""How many standard errors two means may differ by: once in a billion by chance."""


def distribution_difference(trial: Trial, run: Callable[[list[list[Any]]], list[tuple[list[Any], Any]]]) -> str:
    """What distinguishes the results of many draws from torch's: means, variances, the values that occur.

    Args:
        trial: A random one.
        run: Its compiled program.
    """
    *fixed, _ = trial.arrays
    count = len(trial.expected)
    ours: list[list[torch.Tensor | None]] = []
    for seed in range(_DRAWS):
        [(results, _)] = run([[*fixed, np.int64(seed)]])
        ours.append([None if array is None else tensor_of(array).clone() for array in results])
    torch.default_generator.manual_seed(1)
    theirs: list[list[torch.Tensor | None]] = []
    for _ in range(_DRAWS):
        results, gradients, _ = trial.run_in_torch(trial.arguments, trial.cotangents)
        tensors = [None if tensor is None else tensor.detach().clone() for tensor in (*results, *gradients)]
        theirs.append((tensors + trial.written())[:count])
    for index, (mine, torchs) in enumerate(zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True)):
        if mine[0] is None or torchs[0] is None:
            if mine[0] is not torchs[0]:
                return f"result {index}: one has a value, the other none"
            continue
        if (mine[0].dtype, mine[0].shape) != (torchs[0].dtype, torchs[0].shape):
            return f"result {index}: {mine[0].dtype} {list(mine[0].shape)} where torch gives {torchs[0].dtype}"
        rtol, _ = TOLERANCES.get(torchs[0].dtype, (0.0, 0.0))
        if found := _difference(_stacked(mine), _stacked(torchs), rtol):
            return f"result {index}: {found}"
    return ""


def _stacked(draws: Any) -> np.ndarray:
    """(draws, elements)."""
    return torch.stack([draw.to(torch.float64).reshape(-1) for draw in draws]).numpy()


def _difference(ours: np.ndarray, theirs: np.ndarray, rtol: float) -> str:
    if not theirs.size:
        return ""
    if np.isfinite(ours).all() != np.isfinite(theirs).all():
        return "only one draws values that are not finite"
    ours, theirs = np.nan_to_num(ours), np.nan_to_num(theirs)
    if (theirs == np.round(theirs)).all() and not (ours == np.round(ours)).all():
        return "torch draws whole numbers only"
    # Means of a Cauchy distribution do not exist, so values are squashed about their middle first.
    middle, rounding = np.median(theirs, axis=0), rtol * np.abs(theirs).max()
    width = max(np.quantile(np.abs(theirs - middle), 0.99), rounding) or 1.0
    squashed = [np.arctan((draws - middle) / width) for draws in (ours, theirs)]
    for name, power in (("mean", 1), ("spread", 2)):
        first, second = (values**power for values in squashed)
        error = np.sqrt((first.var(axis=0) + second.var(axis=0)) / _DRAWS)
        if (np.abs(first.mean(axis=0) - second.mean(axis=0)) > _SIGMAS * error + rounding / width).any():
            return f"the {name} differs from that of torch's draws"
    lowest, highest = theirs.min(), theirs.max()
    if (theirs.min(axis=0) == theirs.max(axis=0)).all():
        return ""
    reach = highest - lowest
    within = (ours >= lowest - reach) & (ours <= highest + reach)
    return "" if within.mean() > 0.99 else "values lie outside of torch's range"
