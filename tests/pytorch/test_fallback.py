"""Loops that capture cannot speak for run eagerly, correctly, and one line says why and where."""

import pytest
import torch
from parity import assert_same_training, train
from small import batches, made, mlp, sgd, train_on
from torch import nn
from torch.nn import functional as F

from trainingcompiler import FallbackError
from trainingcompiler.reporting.events import Note


@torch.library.custom_op("trainingcompiler_tests::twice", mutates_args=(), device_types="cpu")
def twice(x: torch.Tensor) -> torch.Tensor:
    """An operator that nobody has a lowering for."""
    return x * 2


@twice.register_fake
def _(x):
    return torch.empty_like(x)


twice.register_autograd(lambda ctx, gradient: gradient * 2)


class WithUnknownOperator(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return twice(self.net(x))


class Doubled(torch.autograd.Function):
    """Python that torch runs in its own backward."""

    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


class WithFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return Doubled.apply(self.net(x))


class WithTensorHook(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.seen = mlp(), []

    def forward(self, x):
        out = self.net(x)
        if self.training:
            out.register_hook(lambda gradient: self.seen.append(gradient.abs().sum().item()))
        return out


class WithSelection(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        out = self.net(x)
        return out + out[out > 0].mean()


def test_a_new_optimizer_at_every_step_is_torchs_and_said():
    def loop(objects, data):
        losses = []
        for x, y in data:
            optimizer = torch.optim.SGD(objects["model"].parameters(), lr=0.1)
            loss = nn.functional.cross_entropy(objects["model"](x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    run = assert_same_training(lambda: {"model": mlp()}, loop, batches(), may_fall_back=True)
    (fallback,) = run.fallbacks()
    assert fallback.reason.startswith("each step is the first one of a new optimizer: make the optimizer once")
    assert run.statistics.compiles == 0


CASES = {
    "operator": (WithUnknownOperator, "trainingcompiler_tests.twice.default has no lowering"),
    "function": (WithFunction, "Doubled writes to its arguments"),
    "tensor hook": (WithTensorHook, "Python that backward() runs asks for a value"),
    "selection": (WithSelection, "the shape of a result depends on values (aten."),
}


def collecting(objects, data):
    seen = train_on(objects["model"], objects["optimizer"], data)
    return [*seen, *getattr(objects["model"], "seen", ())]


@pytest.mark.parametrize(("model", "reason"), CASES.values(), ids=CASES)
def test_runs_eagerly_and_says_why_and_where(model, reason):
    run = assert_same_training(
        made(model, torch.optim.SGD, lr=0.1, momentum=0.9), collecting, batches(), may_fall_back=True
    )
    (fallback,) = run.fallbacks()  # said once, not at every step
    assert reason in fallback.reason and "\n" not in fallback.reason
    assert fallback.where.startswith("test_fallback.py:")  # the line at fault, and not the call of the model
    assert run.statistics.compiles == 0 and run.statistics.eager_steps == 24


@pytest.mark.parametrize(("model", "reason"), CASES.values(), ids=CASES)
def test_fallback_error(model, reason):
    with pytest.raises(FallbackError) as raised:
        train(made(model, torch.optim.SGD, lr=0.1), collecting, batches(), compiled=True, fallback="error")
    message = str(raised.value)
    assert reason in message and "--fallback=eager" in message
    assert raised.value.where is not None and raised.value.where in message


def test_fallback_error_names_the_operator():
    with pytest.raises(FallbackError) as raised:
        train(
            made(WithUnknownOperator, torch.optim.SGD, lr=0.1),
            collecting,
            batches(),
            compiled=True,
            fallback="error",
        )
    assert raised.value.operator == "trainingcompiler_tests.twice.default"
    assert raised.value.where.startswith("test_fallback.py:")


@pytest.mark.parametrize("debug", [False, True])
def test_debug_shows_the_error_behind_the_line(debug):
    run = train(made(WithUnknownOperator, torch.optim.SGD, lr=0.1), collecting, batches(), compiled=True, debug=debug)
    notes = [event.text for event in run.events if isinstance(event, Note)]
    assert len(run.fallbacks()) == 1 and len(notes) == debug
    assert all("Traceback" in note and "twice.default has no lowering" in note for note in notes)


def test_one_eager_step_is_said_and_is_no_fallback():
    """A parameter that joins in mid-run has no optimizer state yet; where we do not know it, torch makes it."""

    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        model[0].weight.requires_grad_(False)
        losses = train_on(model, optimizer, data[:8])
        model[0].weight.requires_grad_(True)
        return losses + train_on(model, optimizer, data[8:])

    dampened = made(mlp, torch.optim.SGD, lr=0.01, momentum=0.9, dampening=0.1)
    run = assert_same_training(dampened, loop, batches())
    notes = [event.text for event in run.events if isinstance(event, Note)]
    assert len(notes) == 1 and notes[0].startswith("a step ran eagerly at ")
    assert run.statistics.eager_steps == 2


def test_lbfgs_closure():
    def loop(objects, data):
        losses = []
        for x, y in data:

            def closure(x=x, y=y):
                objects["optimizer"].zero_grad()
                loss = F.cross_entropy(objects["model"](x), y)
                loss.backward()
                return loss

            losses.append(objects["optimizer"].step(closure).item())
        return losses

    # LBFGS amplifies rounding without bound once it has converged: float64 only.
    make = made(mlp, torch.optim.LBFGS, lr=0.1, max_iter=4)
    run = assert_same_training(make, loop, batches(20), may_fall_back=True, dtypes=(torch.float64,))
    assert any("closure" in fallback.reason for fallback in run.fallbacks())


def test_closure_of_an_ordinary_optimizer():
    def loop(objects, data):
        losses = []
        for x, y in data:

            def closure(x=x, y=y):
                objects["optimizer"].zero_grad()
                loss = F.cross_entropy(objects["model"](x), y)
                loss.backward()
                return loss

            losses.append(objects["optimizer"].step(closure).item())
        return losses

    run = assert_same_training(sgd(), loop, batches(), max_compiles=2)
    assert run.statistics.eager_steps == 0


def test_double_backward():
    def loop(objects, data):
        losses = []
        for x, _ in data:
            x.requires_grad_()
            objects["optimizer"].zero_grad()
            out = objects["model"](x)
            (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
            loss = (gradient.norm(2, dim=1) - 1).pow(2).mean() + out.mean()
            loss.backward()
            objects["optimizer"].step()
            losses.append(loss.item())
        return losses

    assert_same_training(sgd(), loop, batches(), may_fall_back=True)


def test_a_hook_added_in_mid_run_runs():
    def loop(objects, data):
        losses = train_on(objects["model"], objects["optimizer"], data[:10])
        seen = []
        handle = objects["model"][0].register_forward_hook(lambda *args: seen.append(args[2].sum().item()))
        losses += train_on(objects["model"], objects["optimizer"], data[10:16])
        handle.remove()
        losses += train_on(objects["model"], objects["optimizer"], data[16:])
        assert len(seen) == 6
        return losses + seen

    run = assert_same_training(sgd(), loop, batches())
    assert run.statistics.compiled_steps == 24


class Fragile(nn.Module):
    """Raises when it is told to."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))

    def forward(self, x, fails=False):
        out = self.net(x)
        if fails:
            raise ArithmeticError("as told")
        return out


def raises_in_forward(objects, x, y):
    objects["model"](x, fails=True)


def raises_for_a_shape(objects, x, y):
    objects["model"](x[:, :5])


def raises_in_the_loss(objects, x, y):
    F.cross_entropy(objects["model"](x), y[:3])


def raises_between_backward_and_step(objects, x, y):
    F.cross_entropy(objects["model"](x), y).backward()
    raise ArithmeticError("as told")


@pytest.mark.parametrize(
    "failure",
    [raises_in_forward, raises_for_a_shape, raises_in_the_loss, raises_between_backward_and_step],
    ids=lambda failure: failure.__name__,
)
def test_an_exception_in_mid_step_leaves_the_model_as_it_was(failure):
    def loop(objects, data):
        losses, caught = [], 0
        for step, (x, y) in enumerate(data):
            if step % 8 == 7:
                before = [p.detach().clone() for p in objects["model"].parameters()]
                try:
                    failure(objects, x, y)
                except (ArithmeticError, RuntimeError, ValueError):
                    caught += 1
                for p, old in zip(objects["model"].parameters(), before, strict=True):
                    assert torch.equal(p, old)
            losses += train_on(objects["model"], objects["optimizer"], [(x, y)])
        return [*losses, caught]

    run = assert_same_training(made(Fragile, torch.optim.SGD, lr=0.1), loop, batches(), may_fall_back=True)
    assert run.observed[-1] == 3


def test_an_exception_that_ends_the_script_is_torchs_own():
    def loop(objects, data):
        train_on(objects["model"], objects["optimizer"], data)
        objects["model"](data[0][0][:, :5])

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        train(sgd(), loop, batches(), compiled=True)


def with_forward(objects, data):
    """The loop calls `model.forward`, and torch knows nothing of a call of the model."""
    losses = []
    for x, y in data:
        objects["optimizer"].zero_grad()
        loss = F.cross_entropy(objects["model"].forward(x), y)
        loss.backward()
        objects["optimizer"].step()
        losses.append(loss.item())
    return losses


class Weights(nn.Module):
    """Parameters that the loop multiplies with by itself."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(8, 4))

    def forward(self, x):
        return x @ self.matrix


def test_a_loop_that_calls_no_module_is_compiled():
    """A parameter that an optimizer trains takes part, which is as good as a call of the model."""
    run = assert_same_training(made(Weights, torch.optim.SGD, lr=0.1), with_forward, batches(), max_compiles=1)
    assert run.statistics.compiled_steps == 24


def with_functional_gradients(objects, data):
    """The loop differentiates by `torch.func`, and nothing that is recorded leads to the gradients."""
    model, losses = objects["model"], []

    def loss_of(parameters, x, y):
        return F.cross_entropy(torch.func.functional_call(model, parameters, (x,)), y)

    for x, y in data:
        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        gradients, loss = torch.func.grad_and_value(loss_of)(parameters, x, y)
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name]
        objects["optimizer"].step()
        losses.append(loss.item())
    return losses


def test_a_loop_whose_gradients_are_not_recorded_is_told_so():
    make = made(Weights, torch.optim.SGD, lr=0.1)
    run = assert_same_training(make, with_functional_gradients, batches(), may_fall_back=True)
    (fallback,) = run.fallbacks()
    assert "its gradients do not come from backward() of what SGD's parameters" in fallback.reason
    assert fallback.where.startswith("test_fallback.py:")
    with pytest.raises(FallbackError, match="do not come from backward"):
        train(make, with_functional_gradients, batches(), compiled=True, fallback="error")


def test_a_loop_that_calls_forward_of_layers_is_seen_by_them():
    assert_same_training(made(mlp, torch.optim.SGD, lr=0.1), with_forward, batches(), max_compiles=1)


def test_a_step_without_gradients_is_no_reason_to_speak():
    def loop(objects, data):
        for _ in data:
            objects["optimizer"].step()
        return []

    assert not train(sgd(), loop, batches(), compiled=True, fallback="error").fallbacks()


def test_a_sparse_input_is_named():
    def loop(objects, data):
        return train_on(objects["model"], objects["optimizer"], [(x.to_sparse(), y) for x, y in data])

    run = assert_same_training(made(Weights, torch.optim.SGD, lr=0.1), loop, batches(), may_fall_back=True)
    assert "with the layout torch.sparse_coo is passed to the model" in run.fallbacks()[0].reason
