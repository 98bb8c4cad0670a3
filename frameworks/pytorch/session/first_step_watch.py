"""Watches a loop up to its first step, where somebody wants to know what it trains with: a plan, or a decision.

Afterwards nothing is left of it between the loop and torch.
"""

import gc
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from trainingcompiler.frameworks.pytorch.interop.passthrough import in_passthrough, passthrough
from trainingcompiler.frameworks.pytorch.interop.pytree import flatten
from trainingcompiler.planning import first_step, planner, recommendation
from trainingcompiler.planning.first_step import BY_HAND, FirstStep, Group

if TYPE_CHECKING:
    from trainingcompiler.frameworks.pytorch.session.session import Session

_ASKED = (*range(2000), *(int(2000 * 1.1**power) for power in range(1, 66)))  # steps at which a function gives rates


class FirstStepWatch:
    """What is seen of the script until its first step.

    Attributes:
        is_over: Whether that has been taken, and is as decided.
    """

    def __init__(self, session: "Session"):
        self._session = session
        self._decided = recommendation.decided()
        self.is_over = planner.current is None and self._decided is None
        self._made: weakref.WeakKeyDictionary[torch.optim.Optimizer, list[float]] = weakref.WeakKeyDictionary()
        self._calls: list[int] = []
        self._depth = 0

    def made(self, optimizer: torch.optim.Optimizer) -> None:
        """Notes the learning rate with which a group has just been made."""
        if not self.is_over:
            self._made.setdefault(optimizer, []).append(_number(optimizer.param_groups[-1].get("lr")))

    def watched(self, call: Callable) -> Callable:
        """`nn.Module.__call__` in front of `call`, until the first step."""
        if self.is_over:
            return call

        def watched_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self.is_over:
                if nn.Module.__call__ is watched_call:
                    nn.Module.__call__ = call  # type: ignore[method-assign]
                return call(module, *args, **kwargs)
            if self._depth == 0 and torch.is_grad_enabled() and self._is_trained(module):
                self._calls.append(_rows(args, kwargs))
            self._depth += 1
            try:
                return call(module, *args, **kwargs)
            finally:
                self._depth -= 1

        return watched_call

    def steps(self) -> None:
        """What has to happen before an optimizer's step.

        Raises:
            UsageError: It is not the step that was decided.
        """
        if self.is_over or in_passthrough():
            return
        gc.collect()  # optimizers that the script has thrown away
        seen = FirstStep(calls=tuple(self._calls), groups=tuple(self._groups()))
        if planner.current is not None:
            planner.current.first_step = seen
        elif self._decided is not None:
            first_step.check(self._decided, seen)
            self.is_over = True
            self._made.clear()

    def _is_trained(self, module: nn.Module) -> bool:
        unwatched = self._session.is_unwatched()
        return not unwatched and any(parameter.requires_grad for parameter in module.parameters())

    def _groups(self) -> Iterator[Group]:
        for optimizer in self._session.registry.optimizers():
            made = self._made.get(optimizer, [])
            kind = type(optimizer).__name__
            for index, group in enumerate(optimizer.param_groups):
                rate = _number(group.get("lr"))
                base = _number(group.get("max_lr", group.get("initial_lr", made[index] if index < len(made) else rate)))
                schedule, highest = "", 1.0
                if "initial_lr" in group:
                    schedule, highest = _scheduled(optimizer, index, base)
                elif base != rate:
                    schedule = BY_HAND
                yield Group(
                    name=kind if len(optimizer.param_groups) == 1 else f"{kind}'s group {index}",
                    lr=rate,
                    base=base,
                    peak=base * highest,
                    schedule=schedule,
                    weight_decay=_number(group.get("weight_decay")),
                )


def _scheduled(optimizer: torch.optim.Optimizer, index: int, base: float) -> tuple[str, float]:
    """The scheduler's class, and the highest multiple of its base to which a group's rate goes."""
    if planner.current is None:
        return "", 1.0
    found = [item for item in gc.get_objects() if issubclass(type(item), LRScheduler) and _is_of(item, optimizer)]
    parts = {id(part) for item in found for part in getattr(item, "_schedulers", ())}
    whole = [item for item in found if id(item) not in parts]
    highest = 1.0
    for item in whole:
        peaks = getattr(item, "max_lrs", getattr(item, "max_lr", None))  # CyclicLR's, and those of many scripts
        peak = peaks[index] if isinstance(peaks, list | tuple) and index < len(peaks) else peaks
        if type(item) is LambdaLR:
            with passthrough():
                highest *= _highest(item.lr_lambdas[index])
        elif isinstance(peak, int | float) and base:
            highest *= peak / base
    return " and ".join(dict.fromkeys(type(item).__name__ for item in whole)) or "a scheduler", highest


def _is_of(scheduler: LRScheduler, optimizer: torch.optim.Optimizer) -> bool:
    own = getattr(scheduler, "optimizer", None)
    return optimizer in (own, getattr(own, "optimizer", None))  # Accelerate's is one around it


def _highest(function: Callable[[int], Any]) -> float:
    """The highest of the multiples that a function gives, for as many steps as it knows."""
    highest = 0.0
    for step in _ASKED:
        try:
            multiple = float(function(step))
        except Exception:  # the script's own code, asked about a step that does not come
            break
        if math.isfinite(multiple):
            highest = max(highest, multiple)
    return highest or 1.0


def _rows(args: tuple, kwargs: dict) -> int:
    tensors: Iterable[Any] = flatten((args, kwargs))[0]
    shapes = (leaf.shape for leaf in tensors if isinstance(leaf, torch.Tensor))
    return next((int(shape[0]) for shape in shapes if len(shape)), 0)


def _number(value: Any) -> float:
    return 0.0 if value is None else float(value)
