"""A value in the middle of a backward, which torch computes from a captured tape: nothing is compiled for it."""

from collections.abc import Callable

import torch

from trainingcompiler.frameworks.pytorch.capture.capture import capture
from trainingcompiler.frameworks.pytorch.interop.arrays import tensor_of
from trainingcompiler.frameworks.pytorch.interop.gradients import real_gradient
from trainingcompiler.frameworks.pytorch.runtime.compiled_step import number_of
from trainingcompiler.frameworks.pytorch.tape.entries import Entry, Input, Slot
from trainingcompiler.frameworks.pytorch.verify.torch_replay import replay


def value_of(entries: list[Entry], slot: Slot, constants: Callable, flags: dict) -> torch.Tensor:
    """Computes one value of a tape.

    Args:
        entries: The tape up to what is asked for; a piece of backward's Python may be running.
        slot: What is asked for.
        constants: See `capture`.
        flags: See `capture`.

    Returns:
        A tensor of its own.

    Raises:
        CaptureError: The tape is none that can be captured.
    """
    captured = capture(entries, constants, flags)
    values: dict[int, torch.Tensor] = {}
    for item in captured.lifted:
        owner = item.gradient_of() if item.gradient_of is not None else None
        tensor = item.tensor() if owner is None else real_gradient(owner)
        assert tensor is not None
        values[item.value] = tensor.detach()
    for index, position, number in captured.leaves:
        leaf = entries[index].leaves[position]
        values[number] = tensor_of(leaf.array) if type(leaf) is Input else leaf.value.detach()
    values.update((number, torch.tensor(entries[index].seed)) for index, number in captured.seeds)
    values.update(
        (number, torch.tensor(number_of(entries, source), dtype=torch.float64)) for source, number in captured.numbers
    )
    wanted = captured.outputs[slot]
    return replay(captured.graph.live_nodes([wanted]), values, [wanted])[wanted].clone()
