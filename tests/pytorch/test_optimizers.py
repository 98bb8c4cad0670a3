"""Every optimizer of torch: 20 steps equal to eager's, or the reason why not stands in docs/optimizers.md."""

import functools
from pathlib import Path

import pytest
import torch
from parity import assert_same, assert_same_training, train
from small import batches, made, mlp, train_on
from torch import nn
from torch.nn import functional as F

import trainingcompiler as tc

PAGE = Path(__file__).parents[2] / "docs" / "optimizers.md"
ROWS = [[cell.strip() for cell in line.split("|")[1:4]] for line in PAGE.read_text().splitlines() if "| " in line]
STATUS = {name: status for name, status, _ in ROWS if status in ("compiled", "step in torch", "eager")}

# Beside the defaults: the options that change which operators an optimizer's step consists of.
OPTIONS = {
    "ASGD": [{}, {"weight_decay": 0.01}],
    "Adadelta": [{"lr": 0.5}, {"weight_decay": 0.01, "maximize": True}],
    "Adafactor": [{}, {"lr": 0.1, "weight_decay": 0.1}],
    "Adagrad": [{}, {"lr_decay": 0.1, "weight_decay": 0.01}],
    "Adam": [{}, {"amsgrad": True, "weight_decay": 0.01}, {"maximize": True}, {"foreach": True}, {"fused": True}],
    "AdamW": [{}, {"amsgrad": True}, {"capturable": False, "foreach": False}],
    "Adamax": [{}, {"weight_decay": 0.01}],
    "Muon": [{}, {"nesterov": False, "weight_decay": 0.0}],
    "NAdam": [{}, {"weight_decay": 0.01, "decoupled_weight_decay": True}],
    "RAdam": [{}, {"weight_decay": 0.01, "decoupled_weight_decay": True}],
    "RMSprop": [{}, {"momentum": 0.9, "centered": True}],
    "Rprop": [{}, {"lr": 0.05}],
    "SGD": [{}, {"momentum": 0.9, "dampening": 0.1}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}],
}
CASES = [(name, options) for name, several in OPTIONS.items() for options in several]


def matrices() -> nn.Module:
    """A model of matrices only, as Muon wants it."""
    return nn.Sequential(nn.Linear(8, 32, bias=False), nn.Tanh(), nn.Linear(32, 4, bias=False))


def test_every_optimizer_stands_in_the_table():
    kinds = {name for name, value in vars(torch.optim).items() if isinstance(value, type)} - {"Optimizer"}
    assert kinds == set(STATUS)
    assert {name for name, status in STATUS.items() if status == "compiled"} == set(OPTIONS)


@pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{n}-{'-'.join(o) or 'defaults'}" for n, o in CASES])
def test_twenty_steps(name, options):
    make = made(matrices if name == "Muon" else mlp, getattr(torch.optim, name), **options)
    # Muon orthogonalizes in bfloat16, whatever its parameters are: two orders of summation differ by its last bit.
    loose = {"float64_tolerance": 2e-2, "dtypes": (torch.float64,)} if name == "Muon" else {}
    run = assert_same_training(make, lambda o, d: train_on(o["model"], o["optimizer"], d), batches(21), **loose)
    assert run.statistics.compiled_steps >= 20 - (name == "Adafactor")


def test_lbfgs_is_eager_and_says_so():
    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]

        def closure(x, y):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        return [optimizer.step(functools.partial(closure, x, y)).item() for x, y in data]

    run = assert_same_training(made(mlp, torch.optim.LBFGS, lr=0.1), loop, batches(20), may_fall_back=True)
    assert "closure" in run.fallbacks()[0].reason and STATUS["LBFGS"] == "eager"


def test_sparse_adam_is_eager_and_says_so():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(10, 4, sparse=True)

        def forward(self, x):
            return self.table(x.argmax(1))

    run = assert_same_training(
        made(Bag, torch.optim.SparseAdam, lr=0.1),
        lambda o, d: train_on(o["model"], o["optimizer"], d),
        batches(20),
        may_fall_back=True,
    )
    assert "sparse" in run.fallbacks()[0].reason and STATUS["SparseAdam"] == "eager"


@pytest.mark.parametrize("name", OPTIONS)
def test_a_warm_up_from_zero_is_one_program(name):
    """The first learning rate of most warm-ups is 0, about which torch's optimizers do not ask."""

    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
        losses = []
        for batch in data:
            losses += train_on(model, optimizer, [batch])
            schedule.step()
        return losses

    make = made(matrices if name == "Muon" else mlp, getattr(torch.optim, name))
    loose = {"float64_tolerance": 2e-2} if name == "Muon" else {}  # as above
    assert_same_training(make, loop, batches(12), max_compiles=1, dtypes=(torch.float64,), **loose)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_complex_parameters(optimizer):
    """Adam has an average of squares for real parts and one for imaginary parts; torch makes its steps."""

    def make():
        weight = nn.Parameter(torch.randn(4, dtype=torch.complex128))
        return {"weight": [weight], "optimizer": [optimizer([weight], lr=0.01)]}  # which are compared by the loop

    def loop(objects, data):
        (weight,), (stepper,), seen = objects["weight"], objects["optimizer"], []
        for index in range(21):
            stepper.zero_grad()
            loss = (weight - 1j * index).abs().pow(2).sum()
            loss.backward()
            stepper.step()
            seen.append(loss.item())
        return [*seen, *torch.view_as_real(weight.detach()).flatten().tolist()]

    falls_back = optimizer is not torch.optim.SGD
    assert_same_training(make, loop, [], dtypes=(torch.float64,), may_fall_back=falls_back)


class Masking(torch.optim.Optimizer):
    """Calls whose result has not the dtype of its first tensor: of masks, with a rate that changes."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        """Updates every parameter."""
        for group in self.param_groups:
            rate = group["lr"]
            for parameter in group["params"]:
                grad = parameter.grad
                large = grad.abs() > 0.01
                parameter.sub_(torch.where(large, rate, grad * 0.3) * 0.01)
                parameter.sub_(torch.add(large, grad, alpha=rate) * 0.01)
                parameter.sub_(torch.mul(large, rate) * grad)
                parameter.sub_(torch.rsub(large.int(), grad, alpha=rate) * 0.01)
                parameter.add_((grad > 0).int().clamp(max=rate) * 0.01)
                parameter.sub_(torch.clamp((grad > 0).int(), max=rate / 2, min=rate) * 0.01)


def test_traced_numbers_beside_masks():
    def loop(objects, data):
        losses = []
        for step, (x, y) in enumerate(data):
            objects["optimizer"].param_groups[0]["lr"] = 0.1 * 0.97**step
            objects["optimizer"].zero_grad()
            outputs, share = objects["model"](x.double()), 0.5 * 0.9**step
            outputs = torch.where(outputs > 0, outputs, share) + torch.rsub(y[:, None], outputs, alpha=share)
            loss = nn.functional.cross_entropy(outputs + torch.where(outputs > 0.1, share, outputs), y)
            loss.backward()
            objects["optimizer"].step()
            losses.append(loss.item())
        return losses

    # float64 parameters under the default dtype float32, which is that of a mask and a number.
    make = made(lambda: mlp().double(), Masking, lr=0.1)
    run = train(make, loop, batches(), compiled=True)
    assert_same(train(make, loop, batches(), compiled=False), run)
    assert not run.fallbacks() and run.statistics.compiles <= 2


def test_an_error_of_torchs_own_stays_torchs():
    model = mlp()
    tc.enable(tc.TrainingCompilerConfig(engine="xla", quiet=True))
    try:
        optimizer = torch.optim.Adam(model.parameters(), capturable=True)
        with pytest.raises(AssertionError, match="capturable=True"):
            train_on(model, optimizer, batches())
    finally:
        tc.disable()
