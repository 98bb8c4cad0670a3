"""A `backward()` that comes after a step has changed parameters behind it: the gradient of a batch before, say.

torch differentiates what it has saved in forward, and refuses where a step has written to that; a linear layer's own
gradient needs its input only. A program has saved nothing. So what is behind a result is kept, with the values that
parameters had, and computed again in torch if its backward comes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from trainingcompiler.frameworks.pytorch.interop.gradients import store_gradient, stored_gradient
from trainingcompiler.frameworks.pytorch.tape.entries import Entry, Input, Slot
from trainingcompiler.frameworks.pytorch.tape.replay import replay, results_of
from trainingcompiler.frameworks.pytorch.tape.tape import Tape


@dataclass(eq=False, slots=True)
class LateBackward:
    """What the backward of a result needs.

    Attributes:
        slot: The result.
        entries: All that it depends on.
        before: The parameters that are about to be written to, each with a copy of its value.
    """

    slot: Slot
    entries: list[Entry]
    before: list[tuple[torch.Tensor, torch.Tensor]]

    def run(self, gradient: torch.Tensor | None, retain_graph: bool | None) -> None:
        """Does what `backward()` does.

        Raises:
            RuntimeError: torch's: a gradient needs what was written to.
        """
        copies = {id(tensor): value.requires_grad_() for tensor, value in self.before}
        inputs: dict[Input, torch.Tensor] = {}
        values: dict[Slot, torch.Tensor] = {}

        def resolve(leaf: Any, _: int) -> Any:
            if type(leaf) is Slot:
                return values[leaf]
            if type(leaf) is Input:
                return inputs.setdefault(leaf, leaf.tensor())
            return copies.get(id(leaf), leaf)

        for entry in self.entries:
            values.update(zip(entry.outputs, results_of(entry, replay(entry, resolve)), strict=False))
        torch.autograd.graph.increment_version(copies.values())
        values[self.slot].backward(gradient, retain_graph)
        for tensor, value in self.before:
            if value.grad is not None:
                known = stored_gradient(tensor)
                store_gradient(tensor, value.grad if known is None else known.add_(value.grad))
                value.grad = None


def kept(tape: Tape, slot: Slot, updated: Iterable[torch.Tensor]) -> LateBackward | None:
    """What the backward of a result will need when parameters have been written to; None if it cannot be kept.

    Args:
        tape: Where the result is.
        slot: The result.
        updated: What is about to be written to.
    """
    # The calls that the result comes from, if all of them are still on the tape and would compute the same again.
    indices = sorted(tape.behind([slot]))
    entries = [tape.entries[index] for index in indices]
    made = {output for entry in entries for output in entry.outputs}
    known = all(read in made for entry in entries for read in entry.slots())
    if not known or any(entry.seed is not None or entry.writes or entry.piece is not None for entry in entries):
        return None
    # The values that they have read of what is about to change.
    read = {id(leaf) for entry in entries for leaf in entry.leaves if isinstance(leaf, torch.Tensor)}
    with torch.no_grad():
        before = [(tensor, tensor.detach().clone()) for tensor in updated if id(tensor) in read]
    return LateBackward(slot, entries, before)
