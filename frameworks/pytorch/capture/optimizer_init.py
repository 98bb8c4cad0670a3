"""The state that an optimizer's first step would make, made ahead, so that the first step is compiled too."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from trainingcompiler.errors import PassingCaptureError
from trainingcompiler.frameworks.pytorch.capture.optimizers import NEW_STATE, of_torch, parameters_of
from trainingcompiler.frameworks.pytorch.interop.gradients import store_gradient, stored_gradient
from trainingcompiler.frameworks.pytorch.interop.passthrough import passthrough

_ALIGNMENT_BYTES = 64  # XLA:CPU's


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
                optimizer.state[parameter]["momentum_buffer"] = _zeros_like(parameter)


def _make_state_of(optimizer: Any, group: dict, parameters: list[torch.Tensor]) -> None:
    before = [stored_gradient(parameter) for parameter in parameters]
    collected: list[list] = [[] for _ in list(inspect.signature(optimizer._init_group).parameters)[1:]]
    with torch.no_grad(), passthrough(), _UntouchedZeros():
        try:
            for parameter in parameters:  # of which only the shape and dtype are looked at
                store_gradient(parameter, parameter.new_zeros(()).expand_as(parameter))
            optimizer._init_group({**group, "params": parameters}, *collected)
        finally:
            for parameter, gradient in zip(parameters, before, strict=True):
                store_gradient(parameter, gradient)


class _UntouchedZeros(TorchFunctionMode):
    """Inside, `torch.zeros_like` gives zeros that nobody has written: for GPT-2 small, 0.5 s of Adam's 1 GB."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.zeros_like and len(args) == 1 and set(kwargs or ()) <= {"memory_format"}:
            return _zeros_like(args[0])
        return function(*args, **(kwargs or {}))


def _zeros_like(tensor: torch.Tensor) -> torch.Tensor:
    """Zeros in memory that the system has promised and not made yet.

    XLA gets a copy at the first step, so that writing zeros there would be for nothing. Aligned, or JAX copies twice.
    """
    if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return torch.zeros_like(tensor, requires_grad=False)
    count = tensor.numel() * tensor.element_size()
    memory = np.zeros(count + _ALIGNMENT_BYTES, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT_BYTES
    storage = torch.from_numpy(memory[start : start + count]).untyped_storage()
    return torch.empty((), dtype=tensor.dtype).set_(storage, 0, tensor.shape, tensor.stride())
