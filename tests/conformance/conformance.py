"""Runs the operators of PyTorch's `OpInfo` database the way a training step runs, and compares them with torch.

Each sample of an entry becomes one entry of a tape: the operator, and the gradients of its results for fixed
cotangents. It is captured, lowered and compiled by the functions that do so for a training step.
"""

import itertools
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import torch
from comparison import difference, overridden_tolerances
from exclusions import GAUGED, TIED, exclusion
from randomness import distribution_difference
from torch.testing._internal import common_methods_invocations
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import OpInfo, SampleInput
from trial import CannotCompile, TorchRefuses, Trial, compiled

PASSES, UNSUPPORTED, EXCLUDED, MISMATCH = "passes", "unsupported", "excluded", "mismatch"

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool)
"""The dtypes of samples that are tested, where an entry has them on the CPU."""

SAMPLES = 12
"""The most samples of an entry and dtype, spread over those that PyTorch generates."""


@dataclass(frozen=True)
class Verdict:
    """What became of one entry and dtype."""

    operator: str
    dtype: str
    status: str
    note: str = ""


@dataclass
class _Tally:
    """What the samples of one entry and dtype have shown so far."""

    passed: int = 0
    refused: list[str] = field(default_factory=list)
    mismatches: list[str] = field(default_factory=list)
    notes: set[str] = field(default_factory=set)

    def status(self) -> tuple[str, str]:
        if self.mismatches:
            return MISMATCH, self.mismatches[0]
        count = self.passed + len(self.refused)
        if self.refused:
            share = "" if not self.passed else f"{len(self.refused)} of {count} samples: "
            return UNSUPPORTED, share + self.refused[0]
        if not self.passed:
            return EXCLUDED, "torch has no sample that it runs itself"
        return PASSES, "; ".join(sorted(self.notes))


def name_of(operator: OpInfo) -> str:
    """The name by which the table lists an entry: `"max:binary"` where the database has variants of one name."""
    return operator.name + (f":{operator.variant_test_name}" if operator.variant_test_name else "")


# The database seeds torch's generator in each call of a random operator, which no training step does.
common_methods_invocations.wrapper_set_seed = lambda operator, *args, **kwargs: operator(*args, **kwargs)

ENTRIES: dict[str, OpInfo] = {name_of(operator): operator for operator in op_db}


def dtypes_of(operator: OpInfo) -> list[torch.dtype]:
    """The dtypes of `DTYPES` that torch computes the operator in on the CPU."""
    supported = operator.supported_dtypes("cpu")
    return [dtype for dtype in DTYPES if dtype in supported]


def is_differentiable(operator: OpInfo, dtype: torch.dtype) -> bool:
    """Whether torch has gradients of the operator in this dtype."""
    return operator.supports_autograd and dtype in operator.supported_backward_dtypes("cpu")


def check(name: str, dtype: torch.dtype, most: int = SAMPLES) -> Verdict:
    """Compares one entry in one dtype, forward and, where torch has gradients, backward.

    Args:
        name: As `name_of` gives it.
        dtype: Of the samples.
        most: How many samples to take at most, spread over those that PyTorch generates.
    """
    operator = ENTRIES[name]
    kind = str(dtype).removeprefix("torch.")
    if reason := exclusion(name, dtype):
        return Verdict(name, kind, EXCLUDED, reason)
    tally = _Tally()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about how its own samples call its own operators
        trials = [trial for sample in _samples(operator, dtype, most) for trial in _trial(operator, sample, tally)]
        _run(trials, overridden_tolerances(operator, dtype), tally)
    return Verdict(name, kind, *tally.status())


def _samples(operator: OpInfo, dtype: torch.dtype, most: int) -> list[SampleInput]:
    # OpInfo.sample_inputs walks the call stack, and torch.manual_seed formats it, at ten times the cost of the rest.
    torch.default_generator.manual_seed(0)
    random.seed(0)
    samples = list(
        itertools.islice(operator.sample_inputs_func(operator, "cpu", dtype, is_differentiable(operator, dtype)), 500)
    )
    if len(samples) <= most:
        return samples
    if most == 1:
        return samples[:1]
    return [samples[index * (len(samples) - 1) // (most - 1)] for index in range(most)]


def _trial(operator: OpInfo, sample: SampleInput, tally: _Tally) -> Iterator[Trial]:
    """The sample, run in torch and captured, if both can be done."""
    try:
        trial = Trial(operator, sample, name_of(operator) in GAUGED, TIED.get(name_of(operator)))
    except TorchRefuses:
        return
    try:
        trial.capture()
    except CannotCompile as error:
        tally.refused.append(str(error))
    else:
        yield trial


def _run(trials: list[Trial], tolerances: dict[str, float] | None, tally: _Tally) -> None:
    plain = [trial for trial in trials if not trial.is_random]
    for trial, results in _results(plain, tally):
        judge(trial, results, tolerances, tally)
    for trial in trials:
        if trial.is_random:
            for _, run in _compiled([trial], tally):
                note = distribution_difference(trial, run)
                tally.notes.add("by distribution")
                _count(note, tally)


def judge(trial: Trial, results: list[Any], tolerances: dict[str, float] | None, tally: _Tally) -> None:
    """Compares what a trial has computed with what torch has."""
    found, by_reference = difference(trial, results, tolerances)
    if by_reference and not found:
        tally.notes.add("as close to float64 as torch")
    _count(found, tally)


def _count(found: str, tally: _Tally) -> None:
    if found:
        tally.mismatches.append(found)
    else:
        tally.passed += 1


def _results(trials: list[Trial], tally: _Tally) -> Iterator[tuple[Trial, list[Any]]]:
    """All trials as one program, one compilation for all, or one by one where XLA refuses the whole."""
    for group, run in _compiled(trials, tally):
        for trial, (results, holds) in zip(group, run([trial.arrays for trial in group]), strict=True):
            if trial.refusal:
                tally.refused.append(trial.refusal)
            elif not holds:
                tally.refused.append("the program finds a value out of range that torch accepts")
            else:
                yield trial, results
    jax.clear_caches()


def _compiled(trials: list[Trial], tally: _Tally) -> Iterator[tuple[list[Trial], Callable]]:
    if not trials:
        return
    try:
        run = compiled(trials)
    except Exception as error:  # whatever XLA or JAX raise: a training step would end with it
        if len(trials) == 1:
            tally.mismatches.append(f"{type(error).__name__}: {error}".splitlines()[0])
            return
        for trial in trials:
            yield from _compiled([trial], tally)
    else:
        if len(trials) == 1 and trials[0].is_random and trials[0].refusal:
            tally.refused.append(trials[0].refusal)
            return
        yield trials, run
