"""`torch.amp.GradScaler` inside a step: whether gradients have overflowed is decided by the program, and not read.

torch looks at the value and calls `optimizer.step()` or does not. Recorded, the step is always computed, and where a
gradient was not finite every tensor keeps what it had: this works for every optimizer, and costs one selection that
XLA fuses into the update.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.amp.grad_scaler import OptState

from trainingcompiler.frameworks.pytorch.capture.optimizers import parameters_of
from trainingcompiler.frameworks.pytorch.tape.deferred_tensor import DeferredTensor


def is_ready(scaler: Any, optimizer: torch.optim.Optimizer) -> bool:
    """Whether `unscale_` may be recorded; torch's own raises the error if it has no business being called."""
    # A fused kernel of torch unscales by itself, and leaves `.grad` scaled.
    fused = getattr(optimizer, "_step_supports_amp_scaling", False)
    return not fused and scaler._scale is not None and _state(scaler, optimizer)["stage"] is OptState.READY


def unscale(parameters: list[torch.Tensor], scale: torch.Tensor) -> torch.Tensor:
    """Divides gradients by the scale, in place.

    Args:
        parameters: Whose gradients; those that have none are left out.
        scale: float32, shape ().

    Returns:
        float32, shape (): 1 where a gradient was infinite or not a number, else 0.
    """
    found_inf = torch.zeros((), dtype=torch.float32, device=scale.device)
    inverse = scale.double().reciprocal().float()
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for gradients in by_dtype.values():
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, found_inf, inverse)
    return found_inf


def unscaled(scaler: Any, optimizer: torch.optim.Optimizer, found_inf: torch.Tensor) -> None:
    """Notes in the scaler that the gradients have been unscaled."""
    state = _state(scaler, optimizer)
    state["found_inf_per_device"] = {scaler._scale.device: found_inf}
    state["stage"] = OptState.UNSCALED


def overflow(scaler: Any, optimizer: torch.optim.Optimizer) -> DeferredTensor | None:
    """What `unscale` has returned if it is recorded and no step has been made of it; else None."""
    state = _state(scaler, optimizer)
    found = list(state["found_inf_per_device"].values())
    if state["stage"] is OptState.UNSCALED and len(found) == 1 and isinstance(found[0], DeferredTensor):
        return found[0]
    return None


def stepped(scaler: Any, optimizer: torch.optim.Optimizer) -> None:
    """Notes in the scaler that the step has been made."""
    _state(scaler, optimizer)["stage"] = OptState.STEPPED


def step_unless(original: Callable, optimizer: torch.optim.Optimizer, found_inf: torch.Tensor) -> None:
    """`original(optimizer)`, undone where `found_inf` is not 0; in torch, not done."""
    if not isinstance(found_inf, FakeTensor):
        if not found_inf.item():
            original(optimizer)
        return
    tensors = list(parameters_of(optimizer))
    tensors += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    with torch.no_grad():
        before = [tensor.clone() for tensor in tensors]
        original(optimizer)
        for tensor, old in zip(tensors, before, strict=True):
            tensor.copy_(torch.where(found_inf != 0, old, tensor))


def is_watched(optimizer: torch.optim.Optimizer) -> bool:
    """Whether somebody tells by the call of `optimizer.step` whether a step was made, as Accelerate does.

    A scheduler also wraps the method, only to warn of a wrong order.
    """
    step = vars(optimizer).get("step")
    own = step is None or getattr(step, "__func__", None) is type(optimizer).step
    return not own and not hasattr(step, "_wrapped_by_lr_sched")


def _state(scaler: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return scaler._per_optimizer_states[id(optimizer)]
