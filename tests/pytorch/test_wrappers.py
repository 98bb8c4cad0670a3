"""Optimizers inside others, closures, loaded states, and numbers that stand twice in a loop."""

import pytest
import torch
from parity import assert_same, assert_same_training, train
from small import adamw, batches, made, mlp, sgd, train_on
from torch.nn import functional as F


class Wrapper(torch.optim.Optimizer):
    """An optimizer that hands everything on, as Accelerate's does: it never calls `Optimizer.__init__`."""

    def __init__(self, inner: torch.optim.Optimizer):
        self.optimizer = inner

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups):
        self.optimizer.param_groups = groups

    def zero_grad(self, set_to_none: bool = True):
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure=None):
        self.optimizer.step(closure)


def test_an_optimizer_around_another_is_looked_through():
    def loop(objects, data):
        return train_on(objects["model"], Wrapper(objects["optimizer"]), data)

    run = assert_same_training(sgd(), loop, batches(), max_compiles=1)
    assert run.statistics.launches == run.statistics.compiled_steps == len(batches())


class Derived:
    """An object whose class is made of the optimizer's own, and which has its attributes, as those of Fabric are."""

    def __init__(self, inner: torch.optim.Optimizer):
        self._inner = inner
        self.__class__ = type("Derived", (Derived, type(inner)), {})

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def step(self, closure=None):
        return self._inner.step()


def test_an_object_that_is_an_optimizer_by_its_class_is_the_one_that_it_stands_for():
    def loop(objects, data):
        return train_on(objects["model"], Derived(objects["optimizer"]), data)

    run = assert_same_training(sgd(), loop, batches(), max_compiles=1)
    assert run.statistics.compiled_steps == len(batches())


def test_two_constants_of_one_operator_are_no_changing_number():
    def loop(objects, data):
        losses = []
        for x, y in data:
            objects["optimizer"].zero_grad()
            out = objects["model"](x)
            loss = F.cross_entropy(out, y) * 0.9 + out.pow(2).mean() * 0.1
            loss.backward()
            objects["optimizer"].step()
            losses.append(loss.item())
        return losses

    assert_same_training(sgd(), loop, batches(), max_compiles=1)


def test_a_loaded_optimizer_needs_no_step_in_torch_first():
    """So that a resumed run repeats the uninterrupted one to the last bit."""

    def whole(objects, data):
        return train_on(objects["model"], objects["optimizer"], data)

    uninterrupted = train(adamw(), whole, batches(), compiled=True)
    first = train(adamw(), whole, batches()[:12], compiled=True)

    def resumed(objects, data):
        objects["model"].load_state_dict(first.objects["model"].state_dict())
        objects["optimizer"].load_state_dict(first.objects["optimizer"].state_dict())
        return first.observed + whole(objects, data)

    second = train(adamw(), resumed, batches()[12:], compiled=True)
    assert second.statistics.eager_steps == 0
    assert_same(uninterrupted, second, float64_tolerance=0.0)


def test_the_shape_of_a_parameter_may_be_asked_before_the_step():
    def loop(objects, data):
        losses, model = [], objects["model"]
        for x, y in data:
            objects["optimizer"].zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            assert sum(parameter.numel() for parameter in model.parameters()) > 0
            objects["optimizer"].step()
            losses.append(loss.detach())
        return [value.item() for value in losses]

    run = assert_same_training(sgd(mlp), loop, batches(), max_compiles=1)
    assert run.statistics.launches == run.statistics.compiled_steps


def test_a_total_of_another_dtype_stays_on_the_tape():
    def loop(objects, data):
        total = torch.zeros((), dtype=torch.float32)
        for x, y in data:
            objects["optimizer"].zero_grad()
            loss = F.cross_entropy(objects["model"](x), y)
            loss.backward()
            total += loss.detach()
            objects["optimizer"].step()
        assert total.dtype == torch.float32
        return [total.item()]

    run = assert_same_training(sgd(), loop, batches(), float64_tolerance=1e-6)  # 24 sums, rounded to float32
    assert run.statistics.launches == run.statistics.compiled_steps


def scaled(clips: bool):
    """A loop with a gradient scaler, in which the gradients of two steps overflow, the first one's among them."""

    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=5)
        losses, scales = [], []
        for step, (x, y) in enumerate(data):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = F.cross_entropy(model(x), y)
            scaler.scale(loss * (float("inf") if step in (0, 7) else 1.0)).backward()
            if clips:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
            scales.append(scaler.get_scale())
        return losses + scales

    return loop


@pytest.mark.parametrize(
    ("kind", "clips"),
    [(torch.optim.SGD, True), (torch.optim.AdamW, False), (torch.optim.NAdam, True), (torch.optim.RMSprop, False)],
)
def test_a_gradient_scaler_skips_the_steps_that_eager_skips(kind, clips):
    """Whether to skip is decided in the program: one a step, and nothing is read."""
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    make = made(mlp, kind, lr=1e-2, **options)
    eager, run = (train(make, scaled(clips), batches(), compiled=compiled) for compiled in (False, True))
    assert not run.fallbacks()
    assert run.statistics.compiled_steps >= len(batches()) - 1  # RMSprop's first may be torch's
    assert run.statistics.launches == run.statistics.compiled_steps
    # float16 rounds at 11 bits, in another order here and there.
    assert_same(eager, run, float64_tolerance=2**-9)


@pytest.mark.parametrize("watched", [True, False])
def test_who_tells_a_skipped_step_by_the_call_is_told(watched):
    """Accelerate replaces `optimizer.step` to see whether the scaler calls it."""

    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        original, called = optimizer.step, []
        for step, (x, y) in enumerate(data):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            scaler.scale(loss * (float("inf") if step == 7 else 1.0)).backward()
            if watched:
                optimizer.step = lambda *args, step=step: (called.append(step), original(*args))[1]
            scaler.step(optimizer)
            scaler.update()
        return [loss.item(), *map(float, called)]

    run = assert_same_training(adamw(), loop, batches())
    assert run.statistics.launches == run.statistics.compiled_steps == len(batches())
    assert run.statistics.host_reads == 1  # of the loss; what is told lies in a tensor of torch's by then


def test_a_fused_optimizer_and_a_gradient_scaler():
    """torch's fused kernels unscale the gradients themselves, and leave `.grad` scaled."""
    make = made(mlp, torch.optim.AdamW, lr=1e-2, fused=True)
    eager, run = (train(make, scaled(False), batches(), compiled=compiled) for compiled in (False, True))
    assert_same(eager, run, float64_tolerance=2**-9)
