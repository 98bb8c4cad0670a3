"""Mixed precision by `torch.autocast`: bfloat16 products, float32 state."""

import pytest
import torch
from parity import assert_same, train
from small import adamw, batches, sgd
from torch import nn
from torch.nn import functional as F


def convolutional():
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 4)), nn.Conv2d(1, 4, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(32, 4)
    )


def whole_forward(model, x, y):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(x)
        return F.cross_entropy(outputs, y), outputs.dtype


def model_only(model, x, y):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(x)
    assert outputs.dtype is torch.bfloat16
    return F.cross_entropy(outputs.float(), y), outputs.dtype


def device_type_spelled(model, x, y):
    with torch.autocast(device_type="cpu", dtype=torch.bfloat16, cache_enabled=False), torch.autocast("cpu"):
        return F.cross_entropy(model(x), y), torch.bfloat16


FORWARDS = (whole_forward, model_only, device_type_spelled)


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda forward: forward.__name__)
@pytest.mark.parametrize("make", [sgd(), adamw(), sgd(convolutional)], ids=["mlp-sgd", "mlp-adamw", "cnn-sgd"])
def test_autocast(forward, make):
    def loop(objects, data):
        losses = []
        for x, y in data:
            objects["optimizer"].zero_grad()
            loss, dtype = forward(objects["model"], x, y)
            assert dtype is torch.bfloat16
            loss.backward()
            objects["optimizer"].step()
            losses.append(loss.item())
        assert all(p.dtype is torch.float32 for p in objects["model"].parameters())
        return losses

    assert_same_within_noise(make, loop, max_compiles=1)


def assert_same_within_noise(make, loop, max_compiles):
    """Compares with eager; twins sum over a batch in other orders, which is the noise of bfloat16 gradients.

    One order is not enough: how far a bias of four numbers is from itself differs by three times between orders.
    """
    data = batches()
    eager = train(make, loop, data, compiled=False)
    twins = []
    for seed in range(4):
        order = torch.randperm(len(data[0][0]), generator=torch.Generator().manual_seed(seed))
        twins.append(train(make, loop, [(x[order], y[order]) for x, y in data], compiled=False))
    run = train(make, loop, data, compiled=True)
    assert not run.fallbacks() and run.statistics.compiles <= max_compiles
    assert_same(eager, run, twins)


def test_autocast_with_accumulation_and_evaluation():
    def loop(objects, data):
        seen = []
        for step, (x, y) in enumerate([batch for batch in data for _ in range(2)]):
            loss, _ = whole_forward(objects["model"], x, y)
            (loss / 2).backward()
            if step % 2:
                objects["optimizer"].step()
                objects["optimizer"].zero_grad()
                with torch.no_grad():
                    seen.append(whole_forward(objects["model"], x, y)[0].item())
        return seen

    assert_same_within_noise(sgd(), loop, max_compiles=4)


def test_autocast_switched_on_in_mid_run_is_another_program():
    def loop(objects, data):
        losses = []
        for step, (x, y) in enumerate(data):
            objects["optimizer"].zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=step >= 12):
                loss = F.cross_entropy(objects["model"](x), y)
            loss.backward()
            objects["optimizer"].step()
            losses.append(loss.item())
        return losses

    assert_same_within_noise(sgd(), loop, max_compiles=2)
