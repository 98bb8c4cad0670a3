"""What capture has to know of `torch.optim`: hyperparameters as inputs, one operator for a whole group."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from trainingcompiler.errors import CaptureError
from trainingcompiler.frameworks.pytorch.capture.traced_float import largest, smallest
from trainingcompiler.frameworks.pytorch.interop.source_lines import user_line

NEW_STATE = "the optimizer creates state for new parameters"

_COUNTERS = (bool, int, float, str)
_FUSABLE = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)


@contextlib.contextmanager
def traced(
    optimizer: torch.optim.Optimizer, number: Callable[[Any, float], float], constants: frozenset
) -> Iterator[None]:
    """Prepares an optimizer for running its `step` under capture, and puts it back.

    Every float in its groups is replaced by what `number(path, value)` returns, unless it is zero: whether it is zero
    is part of the signature, but for the learning rate of torch's own optimizers. Those with a fused kernel use it, so
    that a group is one operator instead of a dozen for each tensor (GPT-2 small: 1 node instead of 2,000); its lowering
    follows the single-tensor code.

    Args:
        optimizer: Any optimizer.
        number: Makes a traced number of the hyperparameter at `path`, `(group, name)` or `(group, name, index)`.
        constants: The paths that stay plain numbers.
    """
    saved = [dict(group) for group in optimizer.param_groups]
    try:
        for index, group in enumerate(optimizer.param_groups):
            for name, value in group.items():
                group[name] = _with_traced(optimizer, (index, name), value, number, constants)
            _choose_kernel(optimizer, group)
        prepared = [dict(group) for group in optimizer.param_groups]
        with _asking_no_values(optimizer):
            yield
        if any(
            group.get(name) is not value
            for group, before in zip(optimizer.param_groups, prepared, strict=True)
            for name, value in before.items()
        ):
            raise counts_in_python(optimizer)
    finally:
        for group, old in zip(optimizer.param_groups, saved, strict=True):
            group.clear()
            group.update(old)


def _with_traced(
    optimizer: torch.optim.Optimizer,
    path: tuple,
    value: Any,
    number: Callable[[Any, float], float],
    constants: frozenset,
) -> Any:
    """A group's value, its floats replaced by traced numbers, but for zero and for what has to stay a constant."""
    if (_is_number(value) or _is_rate(optimizer, path[-1], value)) and path not in constants:
        return number(path, value)
    if type(value) is not tuple:
        return value
    places = [(*path, place) for place in range(len(value))]
    return tuple(
        number(place, item) if _is_number(item) and place not in constants else item
        for place, item in zip(places, value, strict=True)
    )


def _choose_kernel(optimizer: torch.optim.Optimizer, group: dict) -> None:
    """Has a group's update be one operator, or else code for single tensors that keeps its step count in a tensor."""
    if _is_fused(optimizer, group):
        group["fused"], group["foreach"] = True, False
        return
    if "foreach" in group:
        group["foreach"] = False
    if "capturable" in group:
        group["capturable"] = True


def _is_fused(optimizer: torch.optim.Optimizer, group: dict) -> bool:
    """Whether a group's update is one operator; torch has none for complex numbers."""
    is_complex = any(map(torch.is_complex, group["params"]))
    return type(optimizer) in _FUSABLE and not group.get("differentiable") and not is_complex


@contextlib.contextmanager
def _asking_no_values(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Lets torch's optimizers take their tensor-only paths, and `min` and `max` in their code know traced numbers."""
    with contextlib.ExitStack() as stack:
        groups = optimizer.param_groups
        if any("capturable" in group and not _is_fused(optimizer, group) for group in groups):
            # Or they read their step counts on the host; and the capturable path asks for a GPU, unless compiled.
            stack.enter_context(mock.patch.object(torch.compiler, "is_compiling", lambda: True))
        code = inspect.unwrap(type(optimizer).step).__globals__
        if not {"min", "max"} & set(code):
            stack.enter_context(mock.patch.dict(code, {"min": smallest, "max": largest}))
        yield


def number_at(groups: list[dict], path: tuple) -> float:
    """The hyperparameter at `path` of an optimizer's groups."""
    group, name, *index = path
    value = groups[group][name]
    return value[index[0]] if index else value


def pattern(optimizer: torch.optim.Optimizer, constants: frozenset) -> tuple:
    """What a captured `step` depends on besides tensors and numbers: the part of its signature.

    Args:
        optimizer: Any optimizer.
        constants: Paths of the numbers that had to be captured as constants.
    """
    parts = []
    for index, group in enumerate(optimizer.param_groups):
        values = []
        for name, value in group.items():
            if _is_rate(optimizer, name, value) and (index, name) not in constants:
                values.append((name, "rate"))
            elif name != "params":
                values.append((name, _pattern(value, (index, name), constants)))
        parts.append((tuple(map(id, group["params"])), tuple(values)))
    return tuple(parts)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The parameters of all groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def hooks_of(optimizer: torch.optim.Optimizer) -> bool:
    """Whether somebody's code runs before or after every step of the optimizer."""
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
    )


def calls_closure_once(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `step(closure)` is `closure()` and then `step()`, as in all of torch's optimizers but LBFGS."""
    owner = next(parent for parent in type(optimizer).__mro__ if "step" in parent.__dict__)
    return owner.__module__.startswith("torch.optim.") and owner is not torch.optim.LBFGS and not hooks_of(optimizer)


class HostState:
    """What an optimizer keeps outside of tensors: `state["step"] += 1`, `self.k += 1`, `group["t"] += 1`."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        spaces: list[Any] = [vars(optimizer), *optimizer.state.values(), *optimizer.param_groups]
        self._kept = [(space, {k: v for k, v in space.items() if isinstance(v, _COUNTERS)}) for space in spaces]

    def changed(self) -> bool:
        """Whether something is not as it was."""
        return any(
            name not in space or type(space[name]) is not type(value) or space[name] != value
            for space, kept in self._kept
            for name, value in kept.items()
        )

    def restore(self) -> None:
        """Puts everything back."""
        for space, kept in self._kept:
            for name, value in kept.items():
                if space.get(name) is not value:
                    space[name] = value


def counts_in_python(optimizer: torch.optim.Optimizer) -> CaptureError:
    """The error for an optimizer whose step changes its `HostState`."""
    kind = type(optimizer).__name__
    error = CaptureError(f"{kind} counts in Python in its step, so the step itself runs in torch", user_line())
    error.culprit = optimizer
    return error


def has_fake_state(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a captured `step` has put its own stand-ins into the optimizer's state."""
    return any(_is_fake_state(state) for state in optimizer.state.values())


def drop_fake_state(optimizer: torch.optim.Optimizer) -> None:
    """Removes what `has_fake_state` finds."""
    for parameter in [p for p, state in optimizer.state.items() if _is_fake_state(state) or not state]:
        state = optimizer.state[parameter]
        for name in [name for name, value in state.items() if isinstance(value, FakeTensor)]:
            del state[name]
        if all(not isinstance(value, torch.Tensor) for value in state.values()):
            del optimizer.state[parameter]


def _is_fake_state(state: Any) -> bool:
    return isinstance(state, dict) and any(isinstance(value, FakeTensor) for value in state.values())


def of_torch(kind: type) -> bool:
    """Whether a class is one of `torch.optim`'s own."""
    return kind.__module__.split(".")[:2] == ["torch", "optim"]


def _is_rate(optimizer: torch.optim.Optimizer, name: str, value: Any) -> bool:
    """Whether it is a learning rate about which no code asks whether it is zero, as it is when a warm-up begins."""
    return name == "lr" and type(value) is float and of_torch(type(optimizer))


def _is_number(value: Any) -> bool:
    return type(value) is float and value != 0.0


def _pattern(value: Any, path: tuple, constants: frozenset) -> Any:
    if type(value) is tuple:
        return tuple(_pattern(item, (*path, index), constants) for index, item in enumerate(value))
    if _is_number(value) and path not in constants:
        return value > 0
    if isinstance(value, torch.Tensor):
        return id(value)
    return type(value), value
