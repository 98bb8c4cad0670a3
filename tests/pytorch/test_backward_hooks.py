"""Hooks of results and parameters, and what else of Python in backward looks around or gives back what it likes."""

import numpy as np
import pytest
import torch
from parity import assert_same_training
from parity import train as train_once
from small import batches, made, mlp, train_on
from torch import nn
from torch.nn import functional as F

FLOAT64 = (torch.float64,)  # as in test_recording.py: a path that is mistaken for another shows in every digit


def test_hooks_of_parameters_run_in_their_order_until_they_are_removed():
    mask, seen = (torch.arange(32 * 8).reshape(32, 8) % 3 > 0).double(), []

    def make():
        seen.clear()
        objects = made(mlp, torch.optim.SGD, lr=0.1, momentum=0.9)()
        weight, bias = objects["model"][0].weight, objects["model"][3].bias
        weight.register_hook(lambda gradient: gradient * mask)
        weight.register_hook(lambda gradient: seen.append(gradient))
        objects["handle"] = bias.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
        return objects

    def loop(objects, data):
        model, optimizer, losses = objects["model"], objects["optimizer"], []
        for index, (x, y) in enumerate(data):
            optimizer.zero_grad()
            for rows in (slice(0, 8), slice(8, 16)):
                F.cross_entropy(model(x[rows]), y[rows]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            losses.append(seen[-1].sum().item() if index % 2 else 0.0)
            optimizer.step()
            if index == 15:
                objects.pop("handle").remove()
                model[0].bias.register_hook(lambda gradient: 2 * gradient)
        hooks = [len(parameter._backward_hooks or ()) for parameter in model.parameters()]
        return [*losses, *hooks, *(gradient.sum().item() for gradient in seen)]

    assert_same_training(make, loop, batches(), dtypes=FLOAT64)


@pytest.mark.parametrize("mode", ["all", "any"])
def test_a_hook_of_several_gradients_is_torchs(mode):
    calls = []

    def hook(gradients):
        calls.append(len(gradients))

    def loop(objects, data):
        calls.clear()
        model, optimizer, losses = objects["model"], objects["optimizer"], []
        parameters = list(model.parameters())
        torch.autograd.graph.register_multi_grad_hook(parameters, hook, mode=mode)
        for x, y in data:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return [*losses, *calls]

    make = made(mlp, torch.optim.SGD, lr=0.1)
    assert_same_training(make, loop, batches(12), dtypes=FLOAT64, may_fall_back=True)


def of_a_view(parameter):
    view = parameter.expand_as(parameter)
    return view, view.grad_fn.next_functions[0][0]


def of_the_parameter(parameter):
    node = torch.autograd.graph.get_gradient_edge(parameter).node
    return node, node


@pytest.mark.parametrize("node_of", [of_a_view, of_the_parameter])
def test_a_hook_on_the_node_that_accumulates_a_gradient_runs(node_of):
    """Data parallelism was once written so. Nobody knows of the hook: torch runs the steps while the node is there."""
    calls = []

    def loop(objects, data):
        calls.clear()
        model, optimizer, losses, held = objects["model"], objects["optimizer"], [], []
        for step, (x, y) in enumerate(data):
            if step in (0, 4):
                for parameter in model.parameters():
                    kept, node = node_of(parameter)
                    node.register_hook(lambda *_: calls.append(1))
                    held.append(kept)
                del node, kept
            if step == 8:
                held.clear()
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return [*losses, len(calls)]

    make = made(mlp, torch.optim.SGD, lr=0.1)
    run = assert_same_training(make, loop, batches(12), dtypes=FLOAT64, may_fall_back=True)
    assert run.observed[-1] > 0
    assert "accumulates a parameter's gradient has a hook" in str(run.fallbacks()[0])


@pytest.mark.parametrize("begins", [0, 3, 8, 14])
def test_a_hook_on_a_node_that_came_while_torch_ran_the_steps_runs(begins):
    """The default engine lets torch and the program take turns; what is asked of torch meanwhile is not seen."""
    calls = []

    def loop(objects, data):
        calls.clear()
        model, optimizer, losses, held = objects["model"], objects["optimizer"], [], []
        for step, (x, y) in enumerate(data):
            if step == begins:
                for parameter in model.parameters():
                    kept, node = of_a_view(parameter)
                    node.register_hook(lambda *_: calls.append(1))
                    held.append(kept)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss)  # with their graphs, which hold nodes as well
        return [*(loss.item() for loss in losses), len(calls)]

    make = made(mlp, torch.optim.SGD, lr=0.1)
    eager = train_once(make, loop, batches(24), compiled=False)
    auto = train_once(make, loop, batches(24), compiled=True, engine="auto")
    assert auto.observed[-1] == eager.observed[-1] > 0


def test_graphs_that_are_kept_are_no_hooks():
    def loop(objects, data):
        losses = []
        for x, y in data:
            objects["optimizer"].zero_grad()
            losses.append(F.cross_entropy(objects["model"](x), y))
            losses[-1].backward()
            objects["optimizer"].step()
        return [loss.item() for loss in losses]

    run = assert_same_training(made(mlp, torch.optim.SGD, lr=0.1), loop, batches(6), dtypes=FLOAT64)
    assert run.statistics.eager_steps == 0


def test_a_look_at_the_graph_holds_nothing():
    def loop(objects, data):
        view = next(objects["model"].parameters()).square()
        names = [view.grad_fn.name()]
        del view
        return [len(names), *train_on(objects["model"], objects["optimizer"], data)]

    run = assert_same_training(made(mlp, torch.optim.SGD, lr=0.1), loop, batches(6), dtypes=FLOAT64)
    assert run.statistics.eager_steps == 0


@pytest.mark.parametrize("of", ["a parameter", "a result"])
def test_a_hook_that_begins_to_look_at_values_runs_as_often_as_in_eager(of):
    """torch runs what does so from then on; in the step where it begins, nothing runs twice."""
    calls = []

    def counts(gradient):
        calls.append(1.0)
        return gradient * 2

    def looks(gradient):
        calls.append(gradient.norm().item() if len(calls) > 12 else 0.0)

    def loop(objects, data):
        calls.clear()
        model, optimizer, losses = objects["model"], objects["optimizer"], []
        if of == "a parameter":
            for hook in (counts, looks):
                model[0].weight.register_hook(hook)
        for x, y in data:
            optimizer.zero_grad()
            hidden = model[0](x)
            if of == "a result":
                for hook in (counts, looks):
                    hidden.register_hook(hook)
            loss = F.cross_entropy(model[1:](hidden), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return [*losses, *calls]

    make = made(mlp, torch.optim.SGD, lr=0.1)
    run = assert_same_training(make, loop, batches(12), dtypes=FLOAT64, may_fall_back=True)
    assert [event.reason for event in run.fallbacks()] == ["Python that backward() runs asks for a value"]


@pytest.mark.parametrize("of", ["a result", "a parameter", "a function"])
def test_what_python_in_backward_gives_back_from_numpy_is_the_gradient(of):
    """A real tensor that no recorded call has made; recording what backward's Python returns must not be recorded."""

    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 0.5

        @staticmethod
        def backward(ctx, gradient):
            return torch.from_numpy(np.full(tuple(gradient.shape), 0.01))

    def loop(objects, data):
        model, optimizer, losses = objects["model"], objects["optimizer"], []
        if of == "a parameter":
            model[0].weight.register_hook(lambda gradient: torch.from_numpy(np.full((32, 8), 0.02)))
        for x, y in data:
            optimizer.zero_grad()
            hidden = model[0](x)
            if of == "a result":
                hidden.register_hook(lambda gradient: torch.from_numpy(np.full((16, 32), 0.01)))
            elif of == "a function":
                hidden = Half.apply(hidden)
            loss = F.cross_entropy(model[1:](hidden), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    assert_same_training(made(mlp, torch.optim.SGD, lr=0.1), loop, batches(8), dtypes=FLOAT64)


@pytest.mark.parametrize("of", ["a result", "a parameter"])
def test_a_hook_that_returns_another_shape_is_refused_by_backward(of):
    def loop(objects, data):
        model, optimizer, losses = objects["model"], objects["optimizer"], []
        for index, (x, y) in enumerate(data):
            optimizer.zero_grad()
            hidden = model[0](x)
            tensor = hidden if of == "a result" else model[0].weight
            handle = tensor.register_hook(lambda gradient, odd=index == 5: gradient[:2] if odd else 2 * gradient)
            loss = F.cross_entropy(model[1:](hidden), y)
            if index == 5:
                with pytest.raises(RuntimeError, match=r"hook '.*' has changed the size of value"):
                    loss.backward()
            else:
                loss.backward()
                optimizer.step()
            handle.remove()
            losses.append(loss.item())
        return losses

    assert_same_training(made(mlp, torch.optim.SGD, lr=0.1), loop, batches(10), dtypes=FLOAT64, may_fall_back=True)


def test_a_hook_that_looks_at_the_gradient_of_another_parameter():
    """Whether that has been added to by then, only autograd knows: torch runs such steps, and the hook once more."""
    calls = []

    def loop(objects, data):
        calls.clear()
        model, optimizer, losses = objects["model"], objects["optimizer"], []

        def hook(gradient):
            calls.append(1)
            return gradient * (1 if model[3].weight.grad is None else 2)

        model[0].weight.register_hook(hook)
        model[0].bias.register_hook(lambda gradient: gradient if model[0].bias.grad is None else 0 * gradient)
        for x, y in data:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert len(data) <= len(calls) <= len(data) + 1
        return losses

    make = made(mlp, torch.optim.SGD, lr=0.1)
    run = assert_same_training(make, loop, batches(8), dtypes=FLOAT64, may_fall_back=True)
    (event,) = run.fallbacks()
    assert event.reason == "Python that backward() runs looks at the gradient of another parameter"


def test_a_gradient_that_numpy_has_computed_where_torch_takes_over():
    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.abs()

        @staticmethod
        def backward(ctx, gradient):
            return torch.as_tensor(gradient.numpy() * 0.5)

    def loop(objects, data):
        model, optimizer, losses = objects["model"], objects["optimizer"], []
        for x, y in data:
            optimizer.zero_grad()
            loss = F.cross_entropy(model[1:](Slow.apply(model[0](x))), y)
            loss.backward()
            losses.append(model[0].weight.grad.abs().sum().item())
            optimizer.step()
        return losses

    make = made(mlp, torch.optim.SGD, lr=0.1)
    run = assert_same_training(make, loop, batches(6), dtypes=FLOAT64, may_fall_back=True)
    assert [event.reason for event in run.fallbacks()] == ["Python that backward() runs asks for a value"]


def test_an_error_in_a_hook_of_a_parameter_is_the_scripts_and_the_hook_stays():
    def loop(objects, data):
        model, optimizer, seen = objects["model"], objects["optimizer"], []

        def hook(gradient):
            seen.append(1)
            if len(seen) == 5:
                raise ValueError("the fifth")
            return 0.5 * gradient

        handle = model[0].weight.register_hook(hook)
        for x, y in data:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            try:
                loss.backward()
            except ValueError:
                continue
            optimizer.step()
        handle.remove()
        return [len(seen), len(model[0].weight._backward_hooks)]

    assert_same_training(made(mlp, torch.optim.SGD, lr=0.1), loop, batches(12), dtypes=FLOAT64)
