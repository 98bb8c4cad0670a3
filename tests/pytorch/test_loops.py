"""Ordinary training loops, unmodified: compiled, they train the model that eager trains."""

import torch
from parity import assert_same_training
from torch import nn
from torch.nn import functional as F


def batches(count=24, rows=16, features=8, classes=4):
    """Random classification batches."""
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(rows, features, generator=generator), torch.randint(0, classes, (rows,), generator=generator))
        for _ in range(count)
    ]


def mlp():
    """A small classifier."""
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.LayerNorm(32), nn.Linear(32, 4))


def made(model, optimizer, **options):
    """A factory of a model and its optimizer."""

    def make():
        module = model()
        return {"model": module, "optimizer": optimizer(module.parameters(), **options)}

    return make


def sgd():
    return made(mlp, torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3)


def adamw():
    return made(mlp, torch.optim.AdamW, lr=1e-2)


def test_tutorial_loop():
    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        criterion = nn.CrossEntropyLoss()
        losses = []
        for x, y in data:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    assert_same_training(sgd(), loop, batches(), max_compiles=1)
    assert_same_training(adamw(), loop, batches(), max_compiles=1)


def test_loss_read_before_backward():
    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        losses = []
        for x, y in data:
            loss = F.cross_entropy(model(x), y)
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return losses

    assert_same_training(sgd(), loop, batches(), max_compiles=2)
