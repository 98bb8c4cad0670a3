"""The first step of an optimizer is compiled where the state that it makes is known beforehand."""

import copy

import pytest
import torch
from parity import assert_same_training, train
from small import batches, made, mlp, train_on
from torch import nn
from torch.nn import functional as F

from trainingcompiler.frameworks.pytorch.capture.optimizer_init import make_state, makes_state

KNOWN = {
    "Adadelta": {},
    "Adafactor": {},
    "Adagrad": {},
    "Adam": {"amsgrad": True},
    "AdamW": {},
    "Adamax": {},
    "ASGD": {},
    "NAdam": {},
    "RAdam": {},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Rprop": {},
    "SGD": {"momentum": 0.9, "nesterov": True},
}


class Unused(nn.Module):
    """Has a parameter that no gradient reaches, and that therefore gets no state."""

    def __init__(self):
        super().__init__()
        self.net, self.unused = mlp(), nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.net(x)


def of(name: str, parameters, **options) -> torch.optim.Optimizer:
    return getattr(torch.optim, name)(parameters, lr=0.01, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", KNOWN)
def test_the_state_is_what_torch_makes(name, dtype):
    """Names, shapes, dtypes and strides; and the step that finds it does what the step does that makes it."""
    made_by_torch, made_ahead = [], []
    for optimizers in (made_by_torch, made_ahead):
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(4, 3, dtype=dtype)), nn.Parameter(torch.randn(3, dtype=dtype))]
        unused = nn.Parameter(torch.ones(2, dtype=dtype))
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizers += [of(name, [*parameters, unused], **KNOWN[name])]
    made_by_torch[0].step()
    assert makes_state(made_ahead[0])
    make_state(made_ahead[0], lambda parameter: parameter.grad is not None)
    described = [
        [
            {
                key: (tuple(v.shape), v.dtype, v.stride(), v.requires_grad) if isinstance(v, torch.Tensor) else type(v)
                for key, v in optimizer.state.get(parameter, {}).items()
            }
            for parameter in optimizer.param_groups[0]["params"]
        ]
        for optimizer in (made_by_torch[0], made_ahead[0])
    ]
    assert described[0] == described[1]
    for parameter in made_ahead[0].param_groups[0]["params"][:2]:  # whose gradients are still their own
        assert parameter.grad.std() > 0
    made_ahead[0].step()
    for ours, theirs in zip(*(o.param_groups[0]["params"] for o in (made_ahead[0], made_by_torch[0])), strict=True):
        assert torch.equal(ours, theirs)


def test_what_is_not_known():
    parameters = [nn.Parameter(torch.ones(2))]

    class Own(torch.optim.Adam):
        def step(self, closure=None):
            return super().step(closure)

    assert not makes_state(torch.optim.SGD(parameters, lr=0.1, momentum=0.9, dampening=0.1))
    assert not makes_state(torch.optim.LBFGS(parameters))
    assert not makes_state(Own(parameters))


def test_every_step_is_compiled():
    def loop(objects, data):
        return train_on(objects["model"], objects["optimizer"], data)

    run = assert_same_training(made(Unused, torch.optim.AdamW, lr=0.01), loop, batches(), max_compiles=1)
    assert run.statistics.eager_steps == 0
    optimizer = run.objects["optimizer"]
    assert run.objects["model"].unused not in optimizer.state and len(optimizer.state) == 6


def test_a_parameter_that_joins_later():
    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        model[0].weight.requires_grad_(False)
        losses = train_on(model, optimizer, data[:8])
        model[0].weight.requires_grad_(True)
        return losses + train_on(model, optimizer, data[8:])

    run = assert_same_training(made(mlp, torch.optim.Adam, lr=0.01), loop, batches(), max_compiles=2)
    assert run.statistics.eager_steps == 0


def test_gradients_that_nobody_has_cleared_yet():
    """Whether the script throws gradients away is not known before its first `zero_grad`: that step runs in torch."""

    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        losses = []
        for x, y in data:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            optimizer.zero_grad()
        return losses

    run = assert_same_training(made(mlp, torch.optim.Adam, lr=0.01), loop, batches(), max_compiles=1)
    assert run.statistics.eager_steps == 1


def test_a_first_step_that_fails_leaves_the_model_as_it_was():
    """An index out of range: torch raises its own error, and the step after it is as if nothing had happened."""

    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        before = [p.detach().clone() for p in model.parameters()]
        x, y = data[0]
        optimizer.zero_grad()
        with pytest.raises(IndexError):
            F.cross_entropy(model(x), y + 1000).backward()
            optimizer.step()
        assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        return train_on(model, optimizer, data)

    assert_same_training(made(mlp, torch.optim.Adam, lr=0.01), loop, batches(), may_fall_back=True)


def test_a_state_that_was_loaded_is_kept():
    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        losses = train_on(model, optimizer, data[:8])
        again = torch.optim.Adam(model.parameters(), lr=0.01)
        again.load_state_dict(optimizer.state_dict())
        objects["optimizer"] = again
        del optimizer  # it is the only one then, as in a script that resumes
        return losses + train_on(model, again, data[8:])

    run = train(made(mlp, torch.optim.Adam, lr=0.01), loop, batches(), compiled=True)
    assert run.statistics.eager_steps == 0
    assert_same_training(made(mlp, torch.optim.Adam, lr=0.01), loop, batches())


class SetsUp(nn.Module):
    """Finishes itself in its first forward."""

    def __init__(self):
        super().__init__()
        self.net, self.scale = nn.Linear(8, 4), None

    def forward(self, x):
        if self.scale is None:
            self.scale = x.shape[1] ** -0.5
        return self.net(x) * self.scale


@pytest.mark.parametrize(
    ("model", "in_torch"), [(SetsUp, 0), (lambda: nn.Sequential(nn.LazyLinear(16), nn.Tanh(), nn.LazyLinear(4)), 1)]
)
def test_a_first_forward_that_sets_something_up(model, in_torch):
    def loop(objects, data):
        return train_on(objects["model"], objects["optimizer"], data)

    run = assert_same_training(made(model, torch.optim.AdamW, lr=0.01), loop, batches(), max_compiles=1)
    assert run.statistics.eager_steps == in_torch


@pytest.mark.parametrize(
    "parameter",
    [
        torch.ones(3, 5),
        torch.ones(()),
        torch.ones(0, 4),
        torch.ones(7, dtype=torch.bfloat16),
        torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.ones(6, 5).t(),
    ],
    ids=["matrix", "scalar", "empty", "bfloat16", "channels last", "transposed"],
)
def test_zeros_made_ahead_are_tensors_like_any_others(parameter, tmp_path):
    parameter = nn.Parameter(parameter)
    optimizer = torch.optim.AdamW([parameter])
    make_state(optimizer, lambda _: True)
    first, second = (optimizer.state[parameter][name] for name in ("exp_avg", "exp_avg_sq"))
    for state in (first, second):
        wanted = torch.zeros_like(parameter)
        assert (state.shape, state.stride(), state.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)
        assert not state.requires_grad and not state._is_view() and torch.equal(state, wanted)
    first.add_(1.0)
    assert not second.any()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    loaded = torch.load(tmp_path / "optimizer.pt")["state"][0]
    assert torch.equal(loaded["exp_avg"], first) and torch.equal(copy.deepcopy(first), first)
