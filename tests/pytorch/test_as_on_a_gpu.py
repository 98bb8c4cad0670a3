"""What a GPU changes, without one: where state lives, and what a forward is shown of its device.

A CPU stands for the GPU. `tests/gpu/test_gpu_training.py` is the same on one that is there.
"""

from dataclasses import replace

import pytest
import torch
from parity import FLOAT64_TOLERANCE, assert_same, assert_same_training, train
from small import adamw, batches, made, mlp, sgd, train_on
from torch import nn
from torch.nn import functional as F

from trainingcompiler.frameworks.pytorch.interop import devices
from trainingcompiler.frameworks.pytorch.tape import entries
from trainingcompiler.reporting.events import EngineChosen
from trainingcompiler.targets.target import Target

GPU = torch.device("cuda", 0)


@pytest.fixture
def apart(monkeypatch):
    """Programs are run as on a GPU: torch and XLA share no memory, and the loop runs ahead."""
    local = Target.local.__func__
    monkeypatch.setattr(Target, "local", classmethod(lambda *args: replace(local(*args), platform="as a GPU")))


@pytest.fixture
def shown(apart, monkeypatch):
    """Besides, the script's tensors are said to be on a GPU while steps are captured."""
    of = devices.of
    monkeypatch.setattr(devices, "of", lambda tensors: None if of(tensors) is None else GPU)
    monkeypatch.setattr(devices, "drawn_seed", lambda device: 1)
    monkeypatch.setattr(devices, "generator_state", lambda device: 1)
    begin = entries.Slot.__init__
    monkeypatch.setattr(
        entries.Slot, "__init__", lambda slot, meta, device, *numbered: begin(slot, meta, devices.CPU, *numbered)
    )


def loop(objects, data):
    return train_on(objects["model"], objects["optimizer"], data)


def looking_loop(objects, data):
    model, optimizer = objects["model"], objects["optimizer"]
    total, seen = torch.zeros(()), []
    for step, (x, y) in enumerate(data):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.detach()
        if step == 7:
            kept = {name: value.clone() for name, value in model.state_dict().items()}
        if step == 11:
            model.load_state_dict(kept)
            with torch.no_grad():
                model[0].weight.mul_(0.5)
        if step % 5 == 0:
            with torch.no_grad():
                seen.append((model(x).argmax(1) == y).float().mean().item())
    return [*seen, total.item()]


@pytest.mark.parametrize("run", [loop, looking_loop])
@pytest.mark.parametrize("make", [sgd(), adamw()], ids=["sgd", "adamw"])
def test_state_apart_from_torchs(apart, make, run):
    assert_same_training(make, run, batches())


def test_engines_take_turns(apart):
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        data = [(x.double(), y) for x, y in batches(60)]
        eager = train(sgd(), loop, data, compiled=False)
        run = train(sgd(), loop, data, compiled=True, engine="auto")
    finally:
        torch.set_default_dtype(default)
    assert_same(eager, run, float64_tolerance=FLOAT64_TOLERANCE)
    assert [event for event in run.events if isinstance(event, EngineChosen)]
    assert run.statistics.eager_steps >= 4 and run.statistics.compiled_steps >= 4


class Asking(nn.Module):
    """A forward that looks at its device, and makes tensors there."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4)
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x):
        there = x.device
        if type(x).__name__ == "FakeTensor":
            assert there == self.layer.weight.device == self.scale.device == GPU
            assert x.is_cuda and not x.is_cpu and x.get_device() == 0
            made = [
                torch.zeros(4, device="cuda"), torch.arange(4, device=there), x.new_ones(4), x.cuda(), x.to(there),
                x.to("cuda:0", torch.float64), x.to(0), torch.tensor([1.0], device=0), torch.rand(2, device="cuda"),
            ]  # fmt: skip
            assert all(tensor.device == GPU for tensor in made)
        mask = torch.arange(4, device=there) < 3
        return self.layer(x) * mask.to(there, x.dtype) * self.scale


def test_a_forward_is_shown_the_gpu(shown):
    make = made(Asking, torch.optim.SGD, lr=0.1)
    assert_same_training(make, loop, batches(), dtypes=(torch.float64,))


def test_checkpointed_blocks_are_computed_again(shown):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = mlp()

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)

    assert_same_training(made(Checkpointed, torch.optim.SGD, lr=0.1), loop, batches(), dtypes=(torch.float64,))


def test_results_lead_away():
    x = torch.zeros(2)
    assert devices.leads_away(torch.Tensor.cpu, (x,), {}, GPU)
    assert devices.leads_away(torch.Tensor.to, (x, "cpu"), {}, GPU)
    assert devices.leads_away(torch.Tensor.to, (x,), {"device": torch.device("cpu")}, GPU)
    assert not devices.leads_away(torch.Tensor.to, (x, torch.float64), {}, GPU)
    assert not devices.leads_away(torch.Tensor.to, (x, "cuda"), {}, GPU)
    assert not devices.leads_away(torch.Tensor.cpu, (x,), {}, devices.CPU)


def test_a_gpu_that_jax_does_not_find():
    assert devices.cure(devices.CPU) == ""
    assert devices.cure(GPU) == (
        ", and JAX finds no GPU: pip install 'trainingcompiler[cuda13]', or [cuda12], as torch.version.cuda says"
    )


def test_results_given_by_name(shown):
    def by_name(objects, data):
        losses = []
        for x, y in data:
            objects["optimizer"].zero_grad()
            loss = F.cross_entropy(input=objects["model"](x), target=y)
            loss.backward()
            objects["optimizer"].step()
            losses.append(loss.item())
        return losses

    assert_same_training(sgd(), by_name, batches(), dtypes=(torch.float64,))


def test_only_the_cpu_is_reachable_here():
    assert devices.is_reachable(torch.device("cpu"))
    assert not devices.is_reachable(GPU)
    assert not devices.is_reachable(torch.device("meta"))
