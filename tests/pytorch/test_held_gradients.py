"""Gradients that a script knows by another tensor than `p.grad`, hides, or gives back: the smallest loops."""

import numpy as np
import pytest
import torch
from parity import assert_same_training, train
from small import adamw, batches, made, mlp, sgd
from torch import nn
from torch.nn import functional as F


def loop_of(between):
    """A training loop that calls `between(held, model, index)` between backward and step, and returns what it gives."""

    def loop(objects, data):
        model, optimizer, found, held = objects["model"], objects["optimizer"], [], {}
        for index, (x, y) in enumerate(data):
            optimizer.zero_grad(set_to_none=False)
            F.cross_entropy(model(x), y).backward()
            found.append(float(between(held, model, index)))
            optimizer.step()
        return found

    return loop


def held_once(held, model, make):
    if not held:
        held["gradients"] = [make(parameter.grad) for parameter in model.parameters()]
    return held["gradients"]


def is_read(held, model, index):
    return sum(gradient.abs().sum() for gradient in held_once(held, model, lambda g: g))


def is_scaled(held, model, index):
    torch._foreach_mul_(held_once(held, model, lambda g: g), 0.5)
    return 0.0


def is_clipped_through_a_view(held, model, index):
    for view in held_once(held, model, lambda g: g.view(-1)):
        view.clamp_(-0.02, 0.02)
    return 0.0


def is_read_by_numpy(held, model, index):
    return sum(np.linalg.norm(array) for array in held_once(held, model, lambda g: g.numpy()))


@pytest.mark.parametrize("between", [is_read, is_scaled, is_clipped_through_a_view])
def test_a_gradient_held_from_the_first_step_on_is_the_one_of_each_step(between):
    run = assert_same_training(sgd(), loop_of(between), batches())
    assert run.statistics.eager_steps <= 1  # it costs a program more, and not the step


def test_gradients_that_numpy_sees_are_torchs():
    """NumPy may write to them whenever it likes, which a program that updates them would undo."""
    eager = train(sgd(), loop_of(is_read_by_numpy), batches(), compiled=False)
    run = train(sgd(), loop_of(is_read_by_numpy), batches(), compiled=True)
    assert run.observed == pytest.approx(eager.observed, rel=1e-5)  # float32: the order of sums
    assert "lies in memory that NumPy or another process sees" in run.fallbacks()[0].reason


def test_a_gradient_held_between_two_micro_batches():
    def loop(objects, data):
        model, optimizer, found = objects["model"], objects["optimizer"], []
        for index, (x, y) in enumerate(data):
            F.cross_entropy(model(x), y).backward()
            if index % 2 == 0:
                held = [parameter.grad for parameter in model.parameters()]
                continue
            found.append(sum(gradient.norm() for gradient in held).item())
            for gradient in held:
                gradient.clamp_(-0.02, 0.02)
            optimizer.step()
            optimizer.zero_grad()
        return found

    assert_same_training(sgd(), loop, batches(48))


def test_gradients_that_are_parts_of_one_buffer():
    def loop(objects, data):
        model, optimizer, found = objects["model"], objects["optimizer"], []
        flat, start = torch.zeros(sum(p.numel() for p in model.parameters())), 0
        for parameter in model.parameters():
            parameter.grad = flat[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
        for x, y in data:
            flat.zero_()
            F.cross_entropy(model(x), y).backward()
            found.append(flat.norm().item())
            flat.mul_(0.5)
            optimizer.step()
        return found

    assert_same_training(sgd(), loop, batches())


@pytest.mark.parametrize("make", [sgd(), adamw()], ids=["sgd", "adamw"])
@pytest.mark.parametrize("clips", [False, True])
def test_parameters_without_a_gradient_in_some_steps(make, clips):
    def loop(objects, data):
        model, optimizer, found = objects["model"], objects["optimizer"], []
        for index, (x, y) in enumerate(data):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            if index % 3 == 1:
                model[0].weight.grad = None
            if clips:
                found.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1).item())
            optimizer.step()
        return found

    assert_same_training(make, loop, batches())


def test_a_gradient_hidden_from_one_step_and_given_back_for_the_next():
    def loop(objects, data):
        model, optimizer, losses = objects["model"], objects["optimizer"], []
        for x, y in data:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            hidden, model[0].weight.grad = model[0].weight.grad, None
            optimizer.step()
            model[0].weight.grad = hidden.mul_(0.1)
            optimizer.step()
            losses.append(loss.item())
        return losses

    assert_same_training(sgd(), loop, batches())


def _gan():
    generator, critic = nn.Linear(4, 6), nn.Linear(6, 1)
    return {
        "generator": generator,
        "critic": critic,
        "og": torch.optim.SGD(generator.parameters(), lr=0.05),
        "od": torch.optim.SGD(critic.parameters(), lr=0.05, momentum=0.9),
    }


CLEARS = {
    "none": lambda objects: objects["od"].zero_grad(),
    "zeros": lambda objects: objects["od"].zero_grad(set_to_none=False),
    "by hand": lambda objects: [p.grad.zero_() for p in objects["critic"].parameters()],
    "momentum": lambda objects: [s["momentum_buffer"].zero_() for s in objects["od"].state.values()],
    "assigned": lambda objects: [setattr(p, "grad", None) for p in objects["critic"].parameters()],
}


@pytest.mark.parametrize("clears", CLEARS.values(), ids=CLEARS)
def test_what_a_pending_step_uses_is_changed(clears):
    """A generated batch is still needed, so the critic's step waits; beyond some 16 of them torch runs the loop."""

    def loop(objects, data):
        generator, critic, found = objects["generator"], objects["critic"], []
        for x, _ in data:
            fake = generator(x)
            objects["od"].zero_grad()
            critic(fake.detach()).mean().backward()
            found.append(critic.weight.grad.norm().item())
            objects["od"].step()
            clears(objects)
            objects["og"].zero_grad()
            (-critic(fake).mean()).backward()
            objects["og"].step()
        return found

    assert_same_training(_gan, loop, batches(40, features=4), may_fall_back=True)


@pytest.mark.parametrize("as_whole", [False, True], ids=["one parameter", "load_state_dict"])
def test_parameters_whose_contents_are_swapped(as_whole):
    def loop(objects, data):
        model, optimizer, losses = objects["model"], objects["optimizer"], []
        other = {name: value.clone() for name, value in model.state_dict().items()}
        torch.__future__.set_swap_module_params_on_conversion(as_whole)
        try:
            for index, (x, y) in enumerate(data):
                if index % 6 == 5 and as_whole:
                    model.load_state_dict(other)
                elif index % 6 == 5:
                    torch.utils.swap_tensors(model[0].weight, nn.Parameter(other["0.weight"].clone()))
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        return losses

    assert_same_training(made(mlp, torch.optim.SGD, lr=0.1, momentum=0.9), loop, batches())
