"""What the first step of a run trains with: seen in a plan, decided by the launcher, checked in the run.

A decision is worth what the optimizer's groups hold when the first step is about to be taken. They are read by one
and the same code while the script is planned, while its changed run is rehearsed, and in the run itself.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainingcompiler.errors import UsageError

BY_HAND = "set by hand"
"""The `Group.schedule` of a rate that is no longer the one its group was made with, and that no scheduler has set."""

_ROUNDING = 1e-5  # an option is written with ten digits, and Keras keeps its rates in float32


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Parameters that an optimizer updates with the same numbers.

    Attributes:
        name: Which one it is, for a person.
        lr: The learning rate of the first step.
        base: The one that its schedule starts from: of a scheduler, or that the group was made with.
        peak: The highest that the schedule reaches, as far as it tells; only while a script is planned, else `base`.
        schedule: What sets the rate: a scheduler's class, `BY_HAND`, or "" where it is constant.
        weight_decay: As the optimizer is given it.
    """

    name: str
    lr: float
    base: float
    peak: float
    schedule: str = ""
    weight_decay: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstStep:
    """What a first step trains with.

    Attributes:
        calls: For every call whose gradients it adds up, the rows of the first tensor that was given to the model.
        groups: Of all optimizers.
    """

    calls: tuple[int, ...]
    groups: tuple[Group, ...]


def as_json(step: FirstStep) -> dict[str, Any]:
    """A first step as plain data."""
    return dataclasses.asdict(step)


def from_json(content: Mapping[str, Any]) -> FirstStep:
    """A first step as `as_json` has written it."""
    return FirstStep(calls=tuple(content["calls"]), groups=tuple(Group(**group) for group in content["groups"]))


def check(decided: FirstStep, seen: FirstStep) -> None:
    """Holds a run's first step against the one that was decided and rehearsed.

    Raises:
        UsageError: They differ. Nothing has been trained.
    """
    found = []
    if decided.calls != seen.calls:
        found.append(
            f"the rows of each batch that the step adds up: {_listed(decided.calls)} decided, {_listed(seen.calls)} "
            "in the run"
        )
    if len(decided.groups) != len(seen.groups):
        found.append(f"groups of the optimizers: {len(decided.groups)} decided, {len(seen.groups)} in the run")
    else:
        for wanted, group in zip(decided.groups, seen.groups, strict=True):
            for field, meaning in _MEANINGS.items():
                old, new = getattr(wanted, field), getattr(group, field)
                if not is_close(old, new):
                    found.append(f"the {meaning} of {group.name}: {shown(old)} decided, {shown(new)} in the run")
    if found:
        raise UsageError(
            "the first step is not the one that was decided and rehearsed, and nothing has been trained:\n"
            + "".join(f"  {line}\n" for line in found)
            + "What the script does before its first step depends on more than its arguments: make it the same in "
            "every run, or have it ask trainingcompiler.recommendation()"
        )


_MEANINGS = {"base": "base rate", "lr": "learning rate", "weight_decay": "weight decay"}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a rehearsed first step makes of a decision.

    Attributes:
        differences: What is not as decided, a line each, with both values.
        factor: By how much all rates are larger than decided, where that is one number and it is all that differs.
        remarks: What is as decided and worth a word.
    """

    differences: tuple[str, ...] = ()
    factor: float = 1.0
    remarks: tuple[str, ...] = ()


def compare(planned: FirstStep, seen: FirstStep, *, lr: float, weight_decay: float) -> Comparison:
    """Compares the groups of a rehearsed step with the planned ones, scaled.

    A rate that a scheduler sets is compared by its peak: where the schedule begins may follow from the number of its
    steps. One that is set by hand has to be right in the first step too, because nobody knows what follows.

    Args:
        planned: Before the change.
        seen: With it.
        lr: The factor of all learning rates.
        weight_decay: Of all weight decays.
    """
    if len(planned.groups) != len(seen.groups):
        counts = f"{len(planned.groups)} when planned, {len(seen.groups)} with the changes"
        return Comparison(differences=(f"groups of the optimizers: {counts}",))
    rates: list[str] = []
    others: list[str] = []
    remarks: list[str] = []
    factors: list[float] = []
    for old, new in zip(planned.groups, seen.groups, strict=True):
        wanted = old.peak * lr
        if is_close(wanted, new.peak):
            factors += [1.0] if wanted else []
            others += _begins_otherwise(old, new, lr, remarks)
        elif not _is_set_as_decided(old, new, lr):
            rates.append(f"the learning rate of {new.name}: {shown(wanted)} decided, {shown(new.peak)} in the script")
            factors.append(new.peak / wanted if wanted else math.inf)
        wanted = old.weight_decay * weight_decay
        if not is_close(wanted, new.weight_decay):
            both = f"{shown(wanted)} decided, {shown(new.weight_decay)} in the script"
            others.append(f"the weight decay of {new.name}: {both}")
    one = factors[0] if factors else 1.0
    # What else differs may follow from the rate, and is compared again when that has been put right.
    is_common = bool(rates) and 0 < one < math.inf and all(is_close(one, factor) for factor in factors)
    return Comparison(
        differences=(*rates, *others), factor=one if is_common else 1.0, remarks=tuple(dict.fromkeys(remarks))
    )


def _is_set_as_decided(old: Group, new: Group, lr: float) -> bool:
    """Whether a rate is set by hand, whatever its group was made with, and is right."""
    by_hand = old.schedule == new.schedule == BY_HAND
    return by_hand and is_close(old.peak, new.peak) and is_close(old.lr * lr, new.lr)


def _begins_otherwise(old: Group, new: Group, lr: float, remarks: list[str]) -> list[str]:
    if is_close(old.lr * lr, new.lr):
        return []
    if BY_HAND in (old.schedule, new.schedule) or not new.schedule:
        both = f"{shown(old.lr * lr)} decided, {shown(new.lr)} in the script, which sets it by hand"
        return [f"the learning rate of {new.name} in the first step: {both}"]
    remarks.append(
        f"{new.schedule} begins at {shown(new.lr)} and goes up to {shown(new.peak)}; planned it began at "
        f"{shown(old.lr)}: it follows from the script's own number of steps"
    )
    return []


def is_close(one: float, other: float) -> bool:
    """Whether two numbers are equal up to rounding."""
    return math.isclose(one, other, rel_tol=_ROUNDING)


def shown(value: float) -> str:
    """A number as a person reads it."""
    return f"{value:.6g}"


def _listed(calls: Sequence[int]) -> str:
    texts = [str(rows) for rows in calls[:4]]
    return ", ".join([*texts, f"and {len(calls) - 4} more"] if len(calls) > 4 else texts) or "none"
