"""What a run is to change about its batch and what depends on it: decided by the launcher, done by whoever can.

It reaches the worker in an environment variable, so that a script, its library's adapter and the run record see one
and the same thing.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from trainingcompiler.config import RECIPE
from trainingcompiler.errors import UsageError
from trainingcompiler.planning import first_step
from trainingcompiler.planning.batch_scaling import Recipe, Scaled
from trainingcompiler.planning.first_step import FirstStep


def current() -> Scaled | None:
    """The recommendation that this process was started with; None without `--batch-size`."""
    from trainingcompiler.planning import planner  # reaches NumPy, which the launcher does without

    if planner.current is not None:
        planner.current.tell("script")
    return None if _is_planned() else planned()


def planned() -> Scaled | None:
    """The same, whoever asks."""
    text = os.environ.get(RECIPE)
    return from_json(json.loads(text)) if text else None


def for_library(name: str) -> Scaled | None:
    """The recommendation, if this library's arguments are to be set: `"huggingface"` or `"keras"`."""
    text = None if _is_planned() else os.environ.get(RECIPE)
    content = json.loads(text) if text else {}
    return from_json(content) if content.get("applies") == name else None


def decided() -> FirstStep | None:
    """What the first step of this run is to train with; None without `--batch-size`, and where a script is planned."""
    from trainingcompiler.planning import planner

    text = os.environ.get(RECIPE) if planner.current is None else None
    content = json.loads(text).get("first_step") if text else None
    return None if content is None else first_step.from_json(content)


def as_record() -> dict[str, Any]:
    """What the launcher has decided, as the run record has it."""
    scaled, step = planned(), decided()
    return {
        "batch": None if scaled is None else {**as_json(scaled), "said": scaled.describe()},
        "first_step": None if step is None else first_step.as_json(step),
    }


def to_environment(scaled: Scaled, applies: str, decided: FirstStep | None = None) -> dict[str, str]:
    """The variable for the worker.

    Args:
        scaled: The recommendation.
        applies: Whose arguments are to be set.
        decided: What the first step is to train with; None for a rehearsal, which finds out.
    """
    step = None if decided is None else first_step.as_json(decided)
    return {RECIPE: json.dumps({**as_json(scaled), "applies": applies, "first_step": step})}


def _is_planned() -> bool:
    """Whether this process plans the script as it is: then nothing is recommended yet."""
    from trainingcompiler.planning import planner  # reaches NumPy, which the launcher does without

    return planner.current is not None and not planner.current.rehearses


def as_json(scaled: Scaled) -> dict[str, Any]:
    """A recommendation as plain data."""
    return dataclasses.asdict(scaled)


def from_json(content: Mapping[str, Any]) -> Scaled:
    """A recommendation as `as_json` has written it."""
    fields = {field.name: content[field.name] for field in dataclasses.fields(Scaled)}
    recipes = {name: recipe_from_json(content[name]) for name in ("before", "recipe")}
    return Scaled(**{**fields, **recipes, "remarks": tuple(content["remarks"])})


def recipe_from_json(content: Mapping[str, Any]) -> Recipe:
    """A recipe as `dataclasses.asdict` and JSON leave it."""
    betas = content["betas"]
    return Recipe(**{**content, "betas": None if betas is None else (betas[0], betas[1])})


def scaled_number(value: float, old: float, new: float) -> float:
    """A script's own number, changed as the rule changes `old` to `new`; what is equal becomes equal, exactly."""
    return new if value == old else value * (new / old)


def scaled_steps(steps: int, factor: float) -> int:
    """A number of steps that is to mean as many samples as before, for a global batch `factor` times as large."""
    return max(1, -int(-steps // factor))


class NotApplicable(UsageError):
    """The library has no place for a change that the rule asks for."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}. Either leave it as it is, --lr-scaling=none, or have the script ask trainingcompiler."
            "recommendation() and use what it says"
        )
