"""The training step of a model as a program for a GPU that need not be there: captured and compiled, never run."""

import contextlib
import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from trainingcompiler.compiling import compiler
from trainingcompiler.compiling.compiler import Executable
from trainingcompiler.errors import CaptureError, UsageError
from trainingcompiler.frameworks.pytorch.capture.capture import CapturedStep, capture
from trainingcompiler.frameworks.pytorch.capture.optimizers import parameters_of
from trainingcompiler.frameworks.pytorch.capture.traced_float import ConcretizationError
from trainingcompiler.frameworks.pytorch.interop.passthrough import passthrough
from trainingcompiler.frameworks.pytorch.interop.pytree import flatten
from trainingcompiler.frameworks.pytorch.interop.source_lines import user_line
from trainingcompiler.frameworks.pytorch.interop.torch_modes import TorchModes
from trainingcompiler.frameworks.pytorch.runtime.optimizer_registry import OptimizerRegistry
from trainingcompiler.frameworks.pytorch.runtime.program_cache import ProgramCache
from trainingcompiler.frameworks.pytorch.runtime.step_plan import Purpose, plan_step
from trainingcompiler.frameworks.pytorch.tape.entries import Entry, Input
from trainingcompiler.program import StepProgram
from trainingcompiler.reporting.events import phase
from trainingcompiler.targets.target import Target

Loss = Callable[[nn.Module, Any], torch.Tensor]


def compile_step(
    module: nn.Module, optimizer: torch.optim.Optimizer, loss_function: Loss, batch: Any, target: Target
) -> Executable:
    """Compiles the training step of a model for a target, and trains nothing.

    Args:
        module: In the mode it is trained in. Its values do not matter, nor do those of `batch`: a model that is made
            under `torch.nn.utils.skip_init`, or of `torch.empty`, takes next to no memory.
        optimizer: Of the module's parameters; one that has not stepped yet is left without state.
        loss_function: `(module, batch)` to the scalar loss; autocast belongs inside.
        batch: Tensors, in any nest of lists, tuples and dicts.
        target: For what to compile.

    Returns:
        The executable. Its memory plan is that of the real step.

    Raises:
        CaptureError: The step cannot be compiled.
        UsageError: The target is a described GPU, and XLA's compiler for GPUs is not installed.

    Example:
        >>> executable = compile_step(model, optimizer, lambda model, ids: model(ids, labels=ids).loss, ids, target)
        >>> executable.memory.peak_bytes
        4370000000
    """
    target.devices()  # what is not installed is said before anything is captured
    return compiler.compile(step_program(module, optimizer, loss_function, batch), target)


def step_program(module: nn.Module, optimizer: torch.optim.Optimizer, loss_function: Loss, batch: Any) -> StepProgram:
    """Captures the training step of a model: clear gradients, forward, backward, `optimizer.step()`.

    Args:
        module: See `compile_step`.
        optimizer: Likewise.
        loss_function: Likewise.
        batch: Likewise.

    Returns:
        The program; its state is parameters, buffers and optimizer state.

    Raises:
        CaptureError: The step cannot be compiled.
    """

    def train_step(batch: Any) -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_function(module, batch)
        loss.backward()
        optimizer.step()
        return loss

    registry = OptimizerRegistry()
    registry.register(optimizer)
    registry.habits(optimizer).clears = True
    leaves, structure = flatten(((batch,), {}))
    entry = Entry(
        train_step,
        structure,
        [_described(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves],
        TorchModes.now(),
        outputs=None,
        seed=0,
        where=user_line(),
        optimizers=(optimizer,),
        modules=(module,),
    )
    with passthrough(), with_state(optimizer), phase("capture", "train_step") as running:
        captured = _captured(entry)
        running.detail += f"  {len(captured.graph.nodes):,} ops"
        cache = ProgramCache(registry, Target.local())
        program = plan_step(cache, "train_step", [entry], captured, entry.outputs or [], Purpose.COMMIT).program
    if program is None or all(spec.role == "gradient" for spec in program.state):
        raise UsageError("the step changes nothing: does the optimizer train parameters that the loss depends on?")
    return program


def _captured(entry: Entry) -> CapturedStep:
    try:
        return capture([entry])
    except CaptureError:
        raise
    except ConcretizationError:
        reason = "the step decides by the value of a number that changes between steps"
        raise CaptureError(reason, entry.where) from None
    except Exception as error:  # the model's own, most likely
        raise CaptureError(f"{type(error).__name__}: {error}".split("\n")[0], entry.where) from error


def _described(tensor: torch.Tensor) -> Input:
    return Input(None, tuple(tensor.shape), tensor.dtype, tensor.requires_grad)


@contextlib.contextmanager
def with_state(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Gives an optimizer the state that its first step would create, without its values, and takes it away again.

    A copy of the optimizer steps on parameters without memory. The state is pages that nobody touches, so that that of
    a large model takes no memory either.
    """
    missing = [parameter for parameter in parameters_of(optimizer) if parameter not in optimizer.state]
    if missing:
        for parameter, state in _initial_state(optimizer).items():
            if parameter not in optimizer.state:
                optimizer.state[parameter] = {
                    name: torch.empty(value.shape, dtype=value.dtype) if isinstance(value, torch.Tensor) else value
                    for name, value in state.items()
                }
    try:
        yield
    finally:
        for parameter in missing:
            optimizer.state.pop(parameter, None)


def _initial_state(optimizer: torch.optim.Optimizer) -> dict[torch.Tensor, dict[str, Any]]:
    stand_ins = {parameter: _stand_in(parameter) for parameter in parameters_of(optimizer)}
    stepped = copy.copy(optimizer)
    stepped.state = defaultdict(dict)
    stepped.param_groups = [
        {**group, "params": [stand_ins[parameter] for parameter in group["params"]]} for group in optimizer.param_groups
    ]
    for group in stepped.param_groups:
        if "fused" in group:
            group["fused"] = False  # its kernels check for a device
    try:
        type(stepped).step(stepped)  # not an instance's: a scheduler counts those
    except Exception as error:
        raise UsageError(
            f"{type(optimizer).__name__} cannot make its first step on tensors without values ({error}): let it step "
            "once before the step is described"
        ) from error
    return {parameter: dict(stepped.state[stand_in]) for parameter, stand_in in stand_ins.items()}


def _stand_in(parameter: torch.Tensor) -> torch.Tensor:
    stand_in = torch.empty_like(parameter, device="meta").requires_grad_(parameter.requires_grad)
    if parameter.requires_grad:
        stand_in.grad = torch.empty_like(stand_in)
    return stand_in
