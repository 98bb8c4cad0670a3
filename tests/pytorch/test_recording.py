"""All Python of a script runs at every step, and what it asks torch for is compared with the recording.

A path that has been taken is the program that it was; another one is another program, and the numbers are eager's.
"""

import itertools
import random

import numpy as np
import pytest
import torch
from parity import assert_same_training, train
from small import batches, made, mlp, sgd, train_on
from torch import nn
from torch.nn import functional as F

from trainingcompiler.frameworks.pytorch.runtime import program_cache
from trainingcompiler.reporting.events import Note

FLOAT64 = (torch.float64,)  # what is asked here is which path was taken, and float64 leaves rounding no room


class Scaled(nn.Module):
    """A classifier whose outputs are multiplied with whatever `factor` gives."""

    def __init__(self):
        super().__init__()
        self.net, self.calls, self.seen = mlp(), 0, []

    def factor(self, x):
        return 1.0

    def forward(self, x):
        self.calls += 1
        return self.net(x) * self.factor(x)


class Counting(Scaled):
    def factor(self, x):
        return 1 + 0.01 * self.calls


class Ignored(Scaled):
    def factor(self, x):
        self.seen.append(self.calls)  # no torch function gets it
        return 2.0


class WithNumpyNumber(Scaled):
    def factor(self, x):
        return float(np.random.rand())


class WithNumpyScalar(Scaled):
    def factor(self, x):
        return 1 + np.random.rand()


class WithPythonNumber(Scaled):
    def factor(self, x):
        return random.random()


class WithHostData(Scaled):
    def factor(self, x):
        return torch.from_numpy(np.random.rand(4)).to(x.dtype)


class WithListData(Scaled):
    def factor(self, x):
        return torch.tensor([random.random() for _ in range(4)])


class WithTorchNumbers(Scaled):
    def factor(self, x):
        noise = torch.rand(4)
        self.seen += noise.tolist()
        return 1 + noise


class WithNormalNumbersLikeAResult(Scaled):
    def forward(self, x):
        out = self.net(x)
        noise = torch.randn_like(out)
        self.seen.append(noise.sum().item())
        return out + 0.1 * noise


class WithIterator(Scaled):
    def __init__(self):
        super().__init__()
        self.factors = itertools.cycle([0.5, 1.0, 1.5])

    def factor(self, x):
        return next(self.factors)


RATE = 1.0


class WithGlobal(Scaled):
    def factor(self, x):
        global RATE
        RATE *= 0.95
        return RATE


def with_closure():
    rate = 1.0

    class WithClosure(Scaled):
        def factor(self, x):
            nonlocal rate
            rate *= 0.95
            return rate

    return WithClosure()


class WithChoice(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(8, 4), nn.Linear(8, 4)])

    def forward(self, x):
        return random.choice(self.heads)(x)


class WithLayerDrop(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(nn.Linear(8, 8) for _ in range(2)), nn.Linear(8, 4)

    def forward(self, x):
        for block in self.blocks:
            if not self.training or torch.rand(()).item() > 0.5:
                x = x + block(x).tanh()
        return self.head(x)


class WithIndex(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.scales, self.calls = mlp(), nn.Parameter(torch.ones(3, 4)), 0

    def forward(self, x):
        self.calls += 1
        return self.net(x) * self.scales[self.calls % 3]


class WithBranchOnAValue(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.seen = mlp(), []

    def forward(self, x):
        out = self.net(x)
        self.seen.append(float(out.mean() > 0))
        return out * 2 if out.mean() > 0 else out


class WithBranchOnAnInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.seen = mlp(), []

    def forward(self, x):
        self.seen.append(float(x.mean() > 0))
        return self.net(x) * (2 if x.mean() > 0 else 1)


def hooked():
    model = mlp()
    model.seen = []
    model[1].register_forward_hook(lambda module, args, output: model.seen.append(output.mean().item()))
    return model


class FillsAList(nn.Module):
    """Leaves the results of its layers behind, of which the loop makes a loss."""

    def __init__(self):
        super().__init__()
        self.net, self.features = mlp(), []

    def forward(self, x):
        self.features.clear()
        for layer in self.net:
            x = layer(x)
            self.features.append(x)
        return x

    def penalty(self):
        return 1e-3 * sum(feature.pow(2).mean() for feature in self.features)


# The model, and the most programs that it may take.
PYTHON = {
    "a counter": (Counting, 2),
    "a counter that torch never sees": (Ignored, 1),
    "a number of numpy": (WithNumpyNumber, 2),
    "a scalar of numpy": (WithNumpyScalar, 2),
    "a number of python": (WithPythonNumber, 2),
    "an array": (WithHostData, 1),
    "a list": (WithListData, 1),
    "torch.rand": (WithTorchNumbers, 1),
    "torch.randn_like": (WithNormalNumbersLikeAResult, 1),
    "an iterator": (WithIterator, 2),
    "a global": (WithGlobal, 2),
    "a closure": (with_closure, 2),
    "random.choice": (WithChoice, 2),
    "layer drop": (WithLayerDrop, 4),
    "an index": (WithIndex, 3),
    "a branch on a value": (WithBranchOnAValue, 2),
    "a branch on an input": (WithBranchOnAnInput, 2),
    "a hook": (hooked, 1),
    "results in a list": (FillsAList, 1),
}


def seeded(objects, data):
    global RATE
    RATE = 1.0
    np.random.seed(3)
    random.seed(3)
    model, losses = objects["model"], []
    for x, y in data:
        objects["optimizer"].zero_grad()
        loss = F.cross_entropy(model(x), y)
        if isinstance(model, FillsAList):
            loss = loss + model.penalty()
        loss.backward()
        objects["optimizer"].step()
        losses.append(loss.item())
    # The generators are where eager leaves them.
    drawn = [random.random(), np.random.rand(), torch.rand(()).item()]
    return [*losses, *drawn, float(getattr(model, "calls", 0)), *getattr(model, "seen", ())]


@pytest.mark.parametrize(("model", "max_compiles"), PYTHON.values(), ids=PYTHON)
def test_python_of_a_forward_runs_at_every_step(model, max_compiles):
    make = made(model, torch.optim.SGD, lr=0.1, momentum=0.9)
    run = assert_same_training(make, seeded, batches(), max_compiles=max_compiles, dtypes=FLOAT64)
    assert run.statistics.compiled_steps == 24 and not [event for event in run.events if isinstance(event, Note)]


@pytest.mark.parametrize("model", [WithTorchNumbers, WithNormalNumbersLikeAResult], ids=lambda model: model.__name__)
def test_numbers_that_torch_draws_in_a_forward_are_eagers_to_the_bit(model):
    make = made(model, torch.optim.SGD, lr=0.1)
    seen = [train(make, seeded, batches(), compiled=compiled).objects["model"].seen for compiled in (False, True)]
    assert len(seen[0]) >= 24 and seen[0] == seen[1]


# -- what changes in mid-run ----------------------------------------------------------------------------------------


def changing(change):
    """A loop that calls `change(objects, index)` before each step."""

    def loop(objects, data):
        losses = []
        for index, batch in enumerate(data):
            change(objects, index)
            losses += train_on(objects["model"], objects["optimizer"], [batch])
        return losses

    return loop


def nothing(objects, index):
    pass


def an_attribute(objects, index):
    objects["model"].note = index


def an_attribute_that_is_read(objects, index):
    objects["model"].rate = 1.0 - index / 48


def an_attribute_that_is_zero_at_times(objects, index):
    objects["model"].rate = 0.0 if index % 6 == 5 else 1.0 - index / 48


def a_patched_forward(objects, index):
    if index == 8:
        forward = objects["model"].forward
        objects["model"].forward = lambda x: forward(x) * 0.5


def a_patched_function(objects, index):
    objects["model"].last = torch.tanh if 8 <= index < 16 else torch.nn.functional.relu


def a_new_head(objects, index):
    if index == 8:
        head = nn.Linear(32, 4)
        with torch.no_grad():
            head.weight.copy_(torch.linspace(-0.1, 0.1, 128).reshape(4, 32))
            head.bias.zero_()
        objects["model"].net[3] = head
        objects["optimizer"].add_param_group({"params": list(head.parameters())})


def a_hook_that_changes_the_result(objects, index):
    if index == 8:
        objects["handle"] = objects["model"].net[1].register_forward_hook(lambda module, args, output: output * 0.5)
    if index == 16:
        objects.pop("handle").remove()


def a_hook_before_the_call(objects, index):
    if index == 8:
        objects["model"].net[0].register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))


def evaluation_mode(objects, index):
    objects["model"].train(not 8 <= index < 16)


class Changing(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.rate, self.last = mlp(), 1.0, F.relu

    def forward(self, x):
        return self.last(self.net(x)) * self.rate


CHANGES = {
    nothing: 1,
    an_attribute: 1,
    an_attribute_that_is_read: 2,
    an_attribute_that_is_zero_at_times: 3,  # a zero is a constant of its program
    a_patched_forward: 2,
    a_patched_function: 2,
    a_new_head: 2,
    a_hook_that_changes_the_result: 2,
    a_hook_before_the_call: 2,
    evaluation_mode: 1,  # none of its layers asks for it
}


@pytest.mark.parametrize(("change", "max_compiles"), CHANGES.items(), ids=[change.__name__ for change in CHANGES])
def test_a_change_in_mid_run_is_another_path(change, max_compiles):
    make = made(Changing, torch.optim.SGD, lr=0.1)
    run = assert_same_training(make, changing(change), batches(), max_compiles=max_compiles, dtypes=FLOAT64)
    assert run.statistics.compiled_steps == 24 and run.statistics.compiles == max_compiles


def test_an_int_that_is_new_at_every_step_is_compiled_up_to_the_bound(monkeypatch):
    assert program_cache._MOST_PROGRAMS == 32
    monkeypatch.setattr(program_cache, "_MOST_PROGRAMS", 4)

    class Shifted(Scaled):
        def factor(self, x):
            return self.calls  # an int is a constant of its program

    # More steps than one call has branches, so that old ones are forgotten.
    run = assert_same_training(
        made(Shifted, torch.optim.SGD, lr=1e-3), seeded, batches(80), may_fall_back=True, dtypes=FLOAT64
    )
    assert run.statistics.compiles == run.statistics.compiled_steps == 4
    assert [fallback.reason for fallback in run.fallbacks()] == [
        "this loop has been captured 4 times; other shapes, constants or tensors are not compiled"
    ]


# -- what a forward or the loop writes ------------------------------------------------------------------------------


class WithBank(nn.Module):
    """Keeps means of what it has seen, and adds them to its result."""

    def __init__(self, is_buffer):
        super().__init__()
        self.net = mlp()
        if is_buffer:
            self.register_buffer("bank", torch.zeros(3, 4))
        else:
            self.bank = torch.zeros(3, 4)

    def forward(self, x):
        out = self.net(x)
        result = out + 0.1 * self.bank.mean(0)
        with torch.no_grad():
            self.bank.copy_(torch.cat([self.bank[1:], out.detach().mean(0, keepdim=True)]))
        return result


class WithIndexedBank(WithBank):
    def __init__(self, is_buffer):
        super().__init__(is_buffer)
        self.calls = 0

    def forward(self, x):
        out = self.net(x)
        result = out + 0.1 * self.bank.mean(0)
        self.bank[self.calls % 3] = out.detach().mean(0)
        self.calls += 1
        return result


@pytest.mark.parametrize("is_buffer", [True, False], ids=["a buffer", "an attribute"])
@pytest.mark.parametrize(("model", "max_compiles"), [(WithBank, 1), (WithIndexedBank, 3)], ids=["rolled", "indexed"])
def test_a_memory_bank_that_forward_fills(model, max_compiles, is_buffer):
    def loop(objects, data):
        losses = train_on(objects["model"], objects["optimizer"], data)
        return [*losses, *objects["model"].bank.flatten().tolist()]

    make = made(lambda: model(is_buffer), torch.optim.SGD, lr=0.1)
    run = assert_same_training(make, loop, batches(), max_compiles=max_compiles, dtypes=FLOAT64)
    assert run.statistics.compiled_steps == 24


@pytest.mark.parametrize("parts", [1, 3])
def test_a_sum_that_losses_are_added_to_keeps_the_gradient(parts):
    def loop(objects, data):
        losses = []
        for x, y in data:
            objects["optimizer"].zero_grad()
            total = torch.zeros(())
            for part in range(parts):
                total += F.cross_entropy(objects["model"](x[part::parts]), y[part::parts])
            total.backward()
            objects["optimizer"].step()
            losses.append(total.item())
        return losses

    run = assert_same_training(sgd(), loop, batches(), max_compiles=1, dtypes=FLOAT64)
    assert run.statistics.compiled_steps == 24


@pytest.mark.parametrize("flag", [False, True], ids=["frozen", "unfrozen"])
def test_requires_grad_changed_between_a_call_and_its_backward(flag):
    """The call has seen the old flag, and `backward` sees the new one."""

    def loop(objects, data):
        weight, losses = objects["model"][0].weight, []
        for index, (x, y) in enumerate(data):
            objects["optimizer"].zero_grad()
            weight.requires_grad_(not flag)
            loss = F.cross_entropy(objects["model"](x), y)
            if index % 2:
                weight.requires_grad_(flag)
            loss.backward()
            objects["optimizer"].step()
            losses.append(loss.item())
        return losses

    make = made(mlp, torch.optim.SGD, lr=0.1)
    run = assert_same_training(make, loop, batches(), max_compiles=2, dtypes=FLOAT64)
    assert run.statistics.compiled_steps == 24


# -- what is another tensor at every step, and yet the same path ------------------------------------------------------


class WritesItsBatch(Scaled):
    def forward(self, x):
        x[:, 0] = 0
        return self.net(x)


class AssignsABuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        out = self.net(x)
        self.mean = 0.9 * self.mean + 0.1 * out.detach().mean(0)
        return out - self.mean


class KeepsATensor(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.mean = mlp(), None

    def forward(self, x):
        out = self.net(x)
        mean = out.detach().mean(0)
        self.mean = mean if self.mean is None else 0.9 * self.mean + 0.1 * mean
        return out - self.mean


def writes_before_the_call(objects, data):
    losses = []
    for x, y in data:
        x[:, 0] = 0
        losses += train_on(objects["model"], objects["optimizer"], [(x, y)])
    return losses


def skips_batches(objects, data):
    losses = []
    for index, (x, y) in enumerate(data):
        objects["optimizer"].zero_grad()
        loss = F.cross_entropy(objects["model"](x), y)
        losses.append(loss.item())
        if index % 6 < 4:
            continue
        loss.backward()
        objects["optimizer"].step()
    return losses


TENSORS = {
    "a batch that forward writes to": (WritesItsBatch, seeded),
    "a batch that the loop writes to": (mlp, writes_before_the_call),
    "a buffer that forward assigns": (AssignsABuffer, seeded),
    "a tensor that forward keeps": (KeepsATensor, seeded),
    "batches that are skipped": (mlp, skips_batches),
}


@pytest.mark.parametrize(("model", "loop"), TENSORS.values(), ids=TENSORS)
def test_a_new_tensor_at_every_step_is_no_new_path(model, loop):
    # Two paths, and a program for the look at a loss before its backward.
    assert_same_training(made(model, torch.optim.SGD, lr=0.1), loop, batches(), max_compiles=3, dtypes=FLOAT64)


# -- what torch runs -------------------------------------------------------------------------------------------------
