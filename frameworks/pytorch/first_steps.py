"""The state that an optimizer's first step would make, made ahead, so that the first step is compiled too."""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from trainingcompiler.errors import PassingCaptureError
from trainingcompiler.frameworks.pytorch import tensor_hooks
from trainingcompiler.frameworks.pytorch.optimizers import NEW_STATE, of_torch, parameters_of
from trainingcompiler.frameworks.pytorch.replaying import undeferred


def makes_state(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `make_state` knows what the optimizer's first step makes.

    It does for those of `torch.optim` that have a method for it. SGD's first momentum is the gradient itself, which is
    what a buffer of zeros gives, unless there is dampening.
    """
    owners = [next((k for k in type(optimizer).__mro__ if name in vars(k)), None) for name in ("step", "_init_group")]
    if any(owner is None or not of_torch(owner) for owner in owners):
        return False
    return not isinstance(optimizer, torch.optim.SGD) or not any(
        group["momentum"] and group["dampening"] for group in optimizer.param_groups
    )


def prepare(optimizer: torch.optim.Optimizer, has_gradient: Callable[[torch.Tensor], bool]) -> None:
    """Makes what state a step to be captured needs.

    Args:
        optimizer: Any optimizer.
        has_gradient: Tells whether a parameter has a gradient when the step begins.

    Raises:
        PassingCaptureError: SGD with dampening has new parameters, whose first momentum torch makes.
    """
    if makes_state(optimizer):
        make_state(optimizer, has_gradient)
    elif isinstance(optimizer, torch.optim.SGD):
        parameters = parameters_of(optimizer)
        if any(not optimizer.state.get(parameter) and has_gradient(parameter) for parameter in parameters):
            raise PassingCaptureError(NEW_STATE)


def make_state(optimizer: torch.optim.Optimizer, has_gradient: Callable[[torch.Tensor], bool]) -> None:
    """Makes the state that the next `step` would make for the parameters that it finds with a gradient.

    Should torch run the step after all, it finds what it would have made itself.

    Args:
        optimizer: One of which `makes_state` is true.
        has_gradient: Tells whether a parameter has a gradient when the step begins.
    """
    for group in optimizer.param_groups:
        missing = [p for p in group["params"] if not optimizer.state.get(p) and has_gradient(p)]
        if not isinstance(optimizer, torch.optim.SGD):
            _make_state_of(optimizer, group, missing)
        elif group["momentum"]:
            for parameter in missing:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)


def _make_state_of(optimizer: Any, group: dict, parameters: list[torch.Tensor]) -> None:
    before = [tensor_hooks.stored_gradient(parameter) for parameter in parameters]
    collected: list[list] = [[] for _ in list(inspect.signature(optimizer._init_group).parameters)[1:]]
    with torch.no_grad(), undeferred():
        try:
            for parameter in parameters:  # of which only the shape and dtype are looked at
                tensor_hooks.store_gradient(parameter, parameter.new_zeros(()).expand_as(parameter))
            optimizer._init_group({**group, "params": parameters}, *collected)
        finally:
            for parameter, gradient in zip(parameters, before, strict=True):
                tensor_hooks.store_gradient(parameter, gradient)
