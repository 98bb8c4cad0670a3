"""Small data, models and factories that the tests of training loops share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def batches(count: int = 24, rows: int = 16, features: int = 8, classes: int = 4) -> list:
    """Random classification batches: `(float[rows, features], int64[rows])`."""
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(rows, features, generator=generator), torch.randint(0, classes, (rows,), generator=generator))
        for _ in range(count)
    ]


def mlp() -> nn.Module:
    """A small classifier of `batches()`."""
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.LayerNorm(32), nn.Linear(32, 4))


def made(model: Callable[[], nn.Module], optimizer: Callable, **options) -> Callable[[], dict[str, Any]]:
    """A factory of a model and its optimizer."""

    def make():
        module = model()
        return {"model": module, "optimizer": optimizer(module.parameters(), **options)}

    return make


def sgd(model: Callable[[], nn.Module] = mlp) -> Callable[[], dict[str, Any]]:
    """A factory of a model trained by SGD with everything on."""
    return made(model, torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3)


def adamw(model: Callable[[], nn.Module] = mlp) -> Callable[[], dict[str, Any]]:
    """A factory of a model trained by AdamW."""
    return made(model, torch.optim.AdamW, lr=1e-2)


def train_on(model: nn.Module, optimizer: torch.optim.Optimizer, data: list) -> list[float]:
    """The tutorial loop over classification batches; returns the losses."""
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def one_step(loss_of: Callable) -> Callable:
    """A training loop whose loss is `loss_of(model, x, y, index)`; it draws from the same seed each time."""

    def loop(objects, data):
        model, optimizer, losses = objects["model"], objects["optimizer"], []
        torch.manual_seed(3)
        for index, (x, y) in enumerate(data):
            optimizer.zero_grad()
            loss = loss_of(model, x, y, index)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    return loop
