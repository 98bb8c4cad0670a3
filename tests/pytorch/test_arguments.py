"""What models take and return besides tensors: nested containers, numbers, flags, dataclasses."""

from dataclasses import dataclass

import torch
from parity import assert_same_training
from small import batches, made
from torch import nn
from torch.nn import functional as F


@dataclass
class Output:
    logits: torch.Tensor
    hidden: list
    loss: torch.Tensor | None = None
    name: str = "output"


class Structured(nn.Module):
    """Takes and returns more than tensors."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, batch, *, scale=1.0, flags=(), labels=None, mode="mean"):
        hidden = self.first(batch["features"]["x"])
        if "tanh" in flags:
            hidden = torch.tanh(hidden)
        logits = self.second(hidden) * scale
        loss = F.cross_entropy(logits, labels, reduction=mode) if labels is not None else None
        return Output(logits, [hidden, {"shape": hidden.shape}], loss)


def test_nested_and_other_inputs_and_dataclass_outputs():
    def loop(objects, data):
        seen = []
        for x, y in data:
            objects["optimizer"].zero_grad()
            batch = {"features": {"x": x, "names": ["a", "b"]}, "count": len(x)}
            out = objects["model"](batch, scale=2, flags=["tanh"], labels=y, mode="mean")
            assert isinstance(out, Output) and out.name == "output"
            assert out.hidden[1]["shape"] == (16, 16) and out.logits.shape == (16, 4)
            loss = out.loss + 0.1 * out.hidden[0].abs().mean()
            loss.backward()
            objects["optimizer"].step()
            seen += [loss.item(), out.logits.max().item(), out.loss.item()]
        return seen

    assert_same_training(made(Structured, torch.optim.SGD, lr=0.1), loop, batches(), max_compiles=1)


def test_other_inputs_change_the_program():
    def loop(objects, data):
        seen = []
        for step, (x, y) in enumerate(data):
            objects["optimizer"].zero_grad()
            flags = ("tanh",) if step % 2 else ()
            loss = objects["model"]({"features": {"x": x}}, flags=flags, labels=y).loss
            loss.backward()
            objects["optimizer"].step()
            seen.append(loss.item())
        return seen

    assert_same_training(made(Structured, torch.optim.SGD, lr=0.1), loop, batches(), max_compiles=2)
