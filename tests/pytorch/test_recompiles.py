"""What makes a loop compile again, and what must not: changing numbers, shapes, and the line that explains it."""

import itertools
import re

import pytest
import torch
from parity import assert_same_training, train
from small import batches, made, mlp, sgd, train_on
from torch import nn
from torch.nn import functional as F

from trainingcompiler.frameworks.pytorch.runtime import program_cache
from trainingcompiler.reporting.events import Recompiled


def in_the_loop(objects, x, y, number):
    return F.cross_entropy(objects["model"](x), y) * number


def mixed_up(objects, x, y, number):
    mixed = number * x + (1 - number) * x.flip(0)
    outputs = objects["model"](mixed)
    return number * F.cross_entropy(outputs, y) + (1 - number) * F.cross_entropy(outputs, y.flip(0))


def as_an_argument(objects, x, y, number):
    return F.cross_entropy(objects["model"](x, number), y)


def as_an_attribute(objects, x, y, number):
    objects["model"].alpha = number
    return F.cross_entropy(objects["model"](x), y)


def added(objects, x, y, number):
    outputs = objects["model"](x)
    return F.cross_entropy(outputs, y) + torch.mul(outputs.pow(2).mean(), number) - number


class Blended(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()
        self.alpha = 1.0

    def forward(self, x, weight=1.0):
        return self.net(x) * weight * self.alpha


@pytest.mark.parametrize(
    "use", [in_the_loop, mixed_up, as_an_argument, as_an_attribute, added], ids=lambda use: use.__name__
)
def test_a_number_that_changes_every_step(use):
    def loop(objects, data):
        losses = []
        for step, (x, y) in enumerate(data):
            objects["optimizer"].zero_grad()
            loss = use(objects, x, y, (step + 1) / (len(data) + 1))
            loss.backward()
            objects["optimizer"].step()
            losses.append(loss.item())
        return losses

    # What the Python of a module reads can become an input or run eagerly, never a program for each value.
    in_python = use in (as_an_argument, as_an_attribute)
    make = made(Blended, torch.optim.SGD, lr=0.1)
    assert_same_training(make, loop, batches(), max_compiles=2, may_fall_back=in_python)


def test_a_last_smaller_batch_is_one_more_compile_and_explained():
    def loop(objects, data):
        return train_on(objects["model"], objects["optimizer"], data)

    epoch = [*batches(10), tuple(tensor[:7] for tensor in batches(1)[0])]
    run = assert_same_training(sgd(), loop, epoch * 2, max_compiles=2, dtypes=(torch.float64,))
    assert run.statistics.compiles == 2
    (recompiled,) = [event for event in run.events if isinstance(event, Recompiled)]
    assert "float64[16, 8] -> float64[7, 8]" in recompiled.changed
    assert "input" in recompiled.changed  # what the forward of `nn.Sequential` calls it
    assert recompiled.where.startswith("small.py:") and recompiled.count == 2
    assert "drop_last" in recompiled.cure and "\n" not in recompiled.changed


def test_a_new_shape_in_one_argument_is_named():
    def make():
        class Named(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = nn.Linear(8, 4)

            def forward(self, features, *, weights):
                return self.linear(features) * weights.sum()

        model = Named()
        return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}

    def loop(objects, data):
        for step, (x, y) in enumerate(data):
            objects["optimizer"].zero_grad()
            loss = F.cross_entropy(objects["model"](x, weights=torch.ones(3 if step < 12 else 5)), y)
            loss.backward()
            objects["optimizer"].step()
        return []

    run = train(make, loop, batches(), compiled=True)
    (recompiled,) = [event for event in run.events if isinstance(event, Recompiled)]
    assert "weights" in recompiled.changed and "float32[3] -> float32[5]" in recompiled.changed


@pytest.mark.parametrize("sizes", [(16, 15, 14, 13, 16, 15), (16, 15, 14)], ids=["two new ones", "one new one"])
def test_beyond_the_bound_new_shapes_run_eagerly_and_known_ones_stay_compiled(sizes, monkeypatch):
    monkeypatch.setattr(program_cache, "_MOST_PROGRAMS", 2)

    def loop(objects, data):
        rows = itertools.cycle(sizes)
        batches_of_sizes = [(x[:count], y[:count]) for (x, y), count in zip(data, rows, strict=False)]
        return train_on(objects["model"], objects["optimizer"], batches_of_sizes)

    run = assert_same_training(sgd(), loop, batches(24), may_fall_back=True)
    assert run.statistics.compiles == 2
    assert run.statistics.eager_steps == 8  # those with 13 and 14 rows
    assert {fallback.reason for fallback in run.fallbacks()} == {
        "this loop has been captured 2 times; other shapes, constants or tensors are not compiled"
    }


def test_models_trained_one_after_another_share_a_program():
    def loop(objects, data):
        losses = []
        for seed in range(program_cache._MOST_PROGRAMS + 8):  # a search, a cross-validation
            torch.manual_seed(seed)
            model = mlp()
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-2 / (seed + 1))
            losses += train_on(model, optimizer, data)
            objects["last"] = model
        return losses

    run = assert_same_training(dict, loop, batches(12))
    assert run.statistics.compiles == 1 and run.statistics.eager_steps <= 1


def test_models_of_few_steps_are_not_captured_forever(monkeypatch):
    monkeypatch.setattr(program_cache, "_MOST_PROGRAMS", 4)

    def loop(objects, data):
        losses = []
        for seed in range(30):
            torch.manual_seed(seed)
            model = mlp()
            losses += train_on(model, torch.optim.SGD(model.parameters(), lr=0.1), data)
            objects["last"] = model
        return losses

    run = assert_same_training(dict, loop, batches(3), may_fall_back=True)
    assert run.statistics.compiles == 1
    captures = {int(re.search(r"has been captured (\d) times", fallback.reason)[1]) for fallback in run.fallbacks()}
    assert captures in ({5}, {6})  # four, and another for ten runs


def cast_to_what_it_is(x):
    return x.to(x.dtype)


def asked_for_its_values(x):
    return x * (1 if torch.unique(x).numel() > 3 else 2)


@pytest.mark.parametrize("begins", [cast_to_what_it_is, asked_for_its_values])
def test_a_batch_that_a_call_has_met_which_is_not_recorded(begins):
    """The next call that is given the batch is the first to say of which shape it is."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = mlp()

        def forward(self, x):
            y = begins(x)
            return self.layers(y if begins is cast_to_what_it_is else x) + y.mean()

    def loop(objects, data):
        seen = []
        for index, (x, y) in enumerate(data):
            rows = 4 + index % 3
            objects["optimizer"].zero_grad()
            out = objects["model"](x[:rows])
            assert out.shape == (rows, 4)
            loss = F.cross_entropy(out, y[:rows])
            loss.backward()
            objects["optimizer"].step()
            seen.append(loss.item())
        return seen

    make = made(Net, torch.optim.SGD, lr=0.1)
    assert_same_training(make, loop, batches(12), dtypes=(torch.float64,), may_fall_back=True)
