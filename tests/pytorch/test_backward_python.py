"""Python inside of backward: functions and hooks run at every step, in order, and are part of the program."""

import pytest
import torch
from parity import assert_same_training
from small import batches, made
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

FLOAT64 = (torch.float64,)


class Squared(torch.autograd.Function):
    """A gradient that nobody can guess, of two arguments."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x.pow(2) @ weight

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return 1.5 * x * (gradient @ weight.t()), x.pow(2).t() @ gradient if ctx.needs_input_grad[1] else None


class Reversed(torch.autograd.Function):
    """Gives its argument back, with a number for backward."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -ctx.factor * gradient, None


class Same(torch.autograd.Function):
    """Gives its argument back itself."""

    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return 0.5 * gradient


class StraightThrough(torch.autograd.Function):
    """Rounds, of the newer kind."""

    @staticmethod
    def forward(x):
        return (x * 4).round() / 4

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx, gradient):
        x, output = ctx.saved_tensors
        return gradient * (x.abs() < 1) * (1 + output)


class Several(torch.autograd.Function):
    """Two results with a gradient, one without, and a number."""

    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        largest = x.argmax(1)
        ctx.mark_non_differentiable(largest)
        return x * 2, largest, 3, x.sum(1)

    @staticmethod
    def backward(ctx, gradient, none, number, of_sum):
        assert none is None and number is None
        found = 0.3 * gradient
        return found if of_sum is None else found + of_sum[:, None]


class Noisy(torch.autograd.Function):
    """Draws torch's numbers in both directions."""

    @staticmethod
    def forward(ctx, x):
        return x + torch.randn(x.shape)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.rand(gradient.shape)


class Net(nn.Module):
    """One hidden layer, and what the test does to its values."""

    def __init__(self, use):
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)
        self.weight = nn.Parameter(torch.randn(16, 16) * 0.1)
        self.use, self.calls, self.seen = use, 0, []

    def forward(self, x):
        self.calls += 1
        return self.last(self.use(self, torch.tanh(self.first(x))))


def several(net, h):
    doubled, largest, number, total = Several.apply(h)
    net.seen.append(largest)
    return doubled + number if net.calls % 3 else doubled + total[:, None]


def in_a_checkpoint(net, h):
    return checkpoint(lambda h: Squared.apply(h, net.weight).tanh(), h, use_reentrant=False)


def written_to_afterwards(net, h):
    y = Squared.apply(h, net.weight)
    y += h
    return y


def of_a_parameter(net, h):
    return h @ StraightThrough.apply(net.weight)


def hooked(net, h):
    h.register_hook(lambda gradient: net.seen.append(gradient.norm()))
    doubled = 2 * h
    handle = doubled.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01) * (0.1 * net.calls))
    if net.calls % 3 == 0:
        handle.remove()
    return doubled + h


def hooked_now_and_then(net, h):
    if net.calls % 4 == 0:
        h.register_hook(lambda gradient: 0.5 * gradient)
    return h


USES = {
    "two arguments": lambda net, h: Squared.apply(h, net.weight),
    "a number that changes": lambda net, h: Reversed.apply(h, 0.1 * net.calls),
    "its argument": lambda net, h: Same.apply(h),
    "the newer kind": lambda net, h: StraightThrough.apply(h),
    "several results": several,
    "draws": lambda net, h: Noisy.apply(h),
    "one behind another": lambda net, h: Reversed.apply(Squared.apply(Same.apply(h), net.weight), 1.5),
    "one twice": lambda net, h: Squared.apply(h, net.weight) + Squared.apply(2 * h, net.weight.detach()),
    "one of which nothing is used": lambda net, h: (Squared.apply(h, net.weight), h)[1],
    "in a checkpoint": in_a_checkpoint,
    "written to afterwards": written_to_afterwards,
    "of a parameter": of_a_parameter,
    "hooks": hooked,
    "a hook now and then": hooked_now_and_then,
}


def train(objects, data):
    model, optimizer = objects["model"], objects["optimizer"]
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return [*losses, model.calls, *(float(value.double().sum()) for value in model.seen)]


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_is_part_of_the_program(use):
    make = made(lambda: Net(use), torch.optim.SGD, lr=0.1, momentum=0.9)
    assert_same_training(make, train, batches(), dtypes=FLOAT64, max_compiles=4)


@pytest.mark.parametrize("backward", [torch.autograd.backward, lambda losses: sum(losses).backward()])
@pytest.mark.parametrize("use", ["hook", "function"])
def test_between_modules_it_runs_once_for_several_losses(use, backward):
    """An encoder's result with two heads: the gradient that is bounded is the one of both losses."""
    calls = []

    def bounded(gradient):
        calls.append(1)
        return gradient.clamp(-0.01, 0.01)

    class Bounded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return bounded(gradient)

    def loop(objects, data):
        model, optimizer, losses = objects["model"], objects["optimizer"], []
        calls.clear()
        for x, y in data:
            optimizer.zero_grad()
            hidden = model["encoder"](x)
            if use == "hook":
                hidden.register_hook(bounded)
            else:
                hidden = Bounded.apply(hidden)
            both = [F.cross_entropy(model[head](hidden), y) for head in ("first", "second")]
            backward(both)
            optimizer.step()
            losses.append(sum(loss.item() for loss in both))
        return [*losses, len(calls)]

    def net():
        heads = {name: nn.Linear(12, 4) for name in ("first", "second")}
        return nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(8, 12), nn.Tanh()), **heads})

    assert_same_training(made(net, torch.optim.SGD, lr=0.1), loop, batches(), dtypes=FLOAT64, max_compiles=4)


def test_runs_as_often_as_in_eager():
    calls = []

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            calls.append("forward")
            ctx.number = len(calls)
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):
            calls.append(f"backward {ctx.number}")
            return gradient * (2 if len(calls) % 2 else 3)

    def loop(objects, data):
        calls.clear()
        return [*train(objects, data), *map(hash, calls)]

    make = made(lambda: Net(lambda net, h: Counted.apply(Counted.apply(h))), torch.optim.SGD, lr=0.1)
    assert_same_training(make, loop, batches(), dtypes=FLOAT64)


def test_micro_batches_and_evaluations():
    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        seen = []
        for x, y in data:
            optimizer.zero_grad()
            for rows in (slice(0, 8), slice(8, 16)):
                (F.cross_entropy(model(x[rows]), y[rows]) / 2).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            with torch.no_grad():
                seen.append(model(x).sum().item())
        return seen

    make = made(lambda: Net(lambda net, h: Squared.apply(h, net.weight)), torch.optim.AdamW, lr=1e-2)
    assert_same_training(make, loop, batches(), dtypes=FLOAT64)


def test_two_backwards_through_one_graph():
    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        losses = []
        for x, y in data:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward(retain_graph=True)
            (0.1 * loss).backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    make = made(lambda: Net(lambda net, h: Squared.apply(h, net.weight)), torch.optim.SGD, lr=0.1)
    assert_same_training(make, loop, batches(), dtypes=FLOAT64)


def test_an_error_in_backward_is_the_scripts():
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.fails = x.shape[0] < 16
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):
            if ctx.fails:
                raise ValueError("a small batch")
            return 2 * gradient

    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        seen = []
        for step, (x, y) in enumerate(data):
            optimizer.zero_grad()
            rows = 8 if step % 5 == 3 else 16
            loss = F.cross_entropy(model(x[:rows]), y[:rows])
            try:
                loss.backward()
            except ValueError as error:
                seen.append(len(str(error)))
                continue
            optimizer.step()
            seen.append(loss.item())
        return seen

    make = made(lambda: Net(lambda net, h: Failing.apply(h)), torch.optim.SGD, lr=0.1)
    assert_same_training(make, loop, batches(), dtypes=FLOAT64, may_fall_back=True)


class InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, gradient):
        return 3 * gradient


class Asking(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return gradient / max(1e-3, gradient.abs().max().item())


def asked(net, h):
    h.register_hook(lambda gradient: net.seen.append(torch.tensor(gradient.norm().item())))
    return h


LEFT = {
    "writes to its argument": (lambda net, h: InPlace.apply(h * 1), "InPlace writes to its arguments"),
    "asks for a value": (lambda net, h: Asking.apply(h), "Python that backward() runs asks for a value"),
    "a hook that asks for a value": (asked, "Python that backward() runs asks for a value"),
}


@pytest.mark.parametrize(("use", "reason"), LEFT.values(), ids=LEFT)
def test_is_left_to_torch_and_said_once(use, reason):
    make = made(lambda: Net(use), torch.optim.SGD, lr=0.1)
    run = assert_same_training(make, train, batches(), dtypes=FLOAT64, may_fall_back=True)
    assert [fallback.reason for fallback in run.fallbacks()] == [reason]
    assert run.fallbacks()[0].where.startswith("test_backward_python.py:")
