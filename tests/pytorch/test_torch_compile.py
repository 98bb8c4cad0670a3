"""Scripts that use `torch.compile` are compiled as if they did not, and train the same model."""

import pytest
import torch
from parity import assert_same_training, train
from small import adamw, batches, train_on
from test_compile_step import plain_step
from test_fallback import WithUnknownOperator
from torch import nn
from torch.nn import functional as F

import trainingcompiler as tc
from trainingcompiler.reporting.events import Note

# Dynamo warns of what it does itself, without us too: torch 2.13.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]

graphs = []


def backend(graph, inputs):
    """Runs what Dynamo has read with torch's own kernels, and counts it. Inductor would take 20 s a test."""
    graphs.append(graph)
    return graph.forward


COMPILE = {"backend": backend}
WHOLE = {"backend": backend, "fullgraph": True}  # Dynamo must not stumble over us


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    graphs.clear()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def loop(objects, data):
    return train_on(objects["model"], objects["optimizer"], data)


def a_module(objects, data):
    model = torch.compile(objects["model"], **WHOLE)
    losses = loop({**objects, "model": model}, data)
    model.eval()
    with torch.no_grad():
        losses.append(F.cross_entropy(model(data[0][0]), data[0][1]).item())
    assert set(model.state_dict()) == {f"_orig_mod.{name}" for name in objects["model"].state_dict()}
    return losses


def a_module_in_place(objects, data):
    objects["model"].compile(**WHOLE)
    return loop(objects, data)


def a_forward(objects, data):
    model = objects["model"]
    model.forward = torch.compile(model.forward, **WHOLE)
    try:
        return loop(objects, data)
    finally:
        del model.forward


def a_part(objects, data):
    model = objects["model"]
    first = model.first
    model.first = torch.compile(first, **WHOLE)
    model.last.compile(**COMPILE)
    losses = loop(objects, data)
    model.first = first
    return losses


def a_loss(objects, data):
    @torch.compile(**WHOLE)
    def smoothed(outputs, y):
        return F.cross_entropy(outputs, y, label_smoothing=0.1) + outputs.square().mean()

    return with_loss(smoothed, objects, data)


def with_loss(loss_of, objects, data):
    losses = []
    for x, y in data:
        objects["optimizer"].zero_grad()
        loss = loss_of(objects["model"](x), y)
        loss.backward()
        objects["optimizer"].step()
        losses.append(loss.item())
    return losses


def a_backward(objects, data):
    @torch.compile(**COMPILE)
    def forward_backward(x, y):
        loss = F.cross_entropy(objects["model"](x), y)
        loss.backward()
        return loss.detach()

    losses = []
    for x, y in data:
        objects["optimizer"].zero_grad()
        losses.append(forward_backward(x, y).item())
        objects["optimizer"].step()
    return losses


def a_step(objects, data):
    step = torch.compile(lambda: objects["optimizer"].step(), **COMPILE)
    losses = []
    for x, y in data:
        objects["optimizer"].zero_grad()
        loss = F.cross_entropy(objects["model"](x), y)
        loss.backward()
        step()
        losses.append(loss.item())
    return losses


WAYS = [a_module, a_module_in_place, a_forward, a_part, a_loss, a_backward, a_step]


@pytest.mark.parametrize("way", WAYS)
def test_same_training(way):
    read_by_dynamo = []

    def counted(objects, data):
        before = len(graphs)
        losses = way(objects, data)
        read_by_dynamo.append(len(graphs) - before)
        return losses

    run = assert_same_training(adamw(Net), counted, batches(), dtypes=(torch.float32,))
    assert read_by_dynamo[0] > 0 and read_by_dynamo[-1] == 0  # eager, and compiled by us
    assert run.statistics.eager_steps == 0
    assert any("is left out of compiled steps" in event.text for event in run.events if isinstance(event, Note))


@pytest.mark.parametrize("way", WAYS)
def test_where_torch_runs_the_steps_it_runs_what_it_has_compiled(way):
    eager = train(adamw(Net), way, batches(), compiled=False)
    count = len(graphs)
    torch._dynamo.reset()
    run = train(adamw(Net), way, batches(), compiled=True, engine="eager")
    assert run.observed == eager.observed
    assert len(graphs) == 2 * count > 0


@pytest.mark.parametrize("way", [a_module, a_module_in_place, a_part])
def test_the_first_step_waits_for_no_other_compiler(way):
    def make():
        objects = adamw(Net)()
        optimizer = objects["optimizer"]  # the first step is torch's: nobody knows yet that gradients are cleared
        optimizer.zero_grad = lambda: optimizer.state and type(optimizer).zero_grad(optimizer)
        return objects

    run = train(make, way, batches(), compiled=True)
    assert run.statistics.eager_steps == 1 and run.statistics.compiled_steps == 23
    assert not graphs


class NetWithUnknownOperator(Net):
    def __init__(self):
        super().__init__()
        self.unknown = WithUnknownOperator()

    def forward(self, x):
        return super().forward(x) + self.unknown(x)


@pytest.mark.parametrize("way", [a_module, a_module_in_place, a_part, a_loss])
def test_a_step_that_falls_back_runs_what_torch_has_compiled(way):
    run = train(adamw(NetWithUnknownOperator), way, batches(), compiled=True)
    eager = train(adamw(NetWithUnknownOperator), way, batches(), compiled=False)
    assert run.observed == pytest.approx(eager.observed, rel=1e-5)  # its first step ran before anybody had read it
    assert len(run.fallbacks()) == 1 and run.statistics.compiled_steps == 0
    assert graphs


def test_a_function_compiled_before_us():
    smoothed = torch.compile(lambda outputs, y: F.cross_entropy(outputs, y, label_smoothing=0.1), **COMPILE)
    assert_same_training(adamw(Net), lambda objects, data: with_loss(smoothed, objects, data), batches())


def test_torch_compile_is_torchs_own_again_afterwards():
    original = torch.compile
    train(adamw(Net), loop, batches(), compiled=True)
    assert torch.compile is original


@pytest.mark.parametrize("engine", ["xla", "eager"])
def test_in_a_function_given_to_compile(engine):
    def trained(by):
        torch.manual_seed(0)
        objects = adamw(Net)()
        objects["model"] = torch.compile(objects["model"], **WHOLE)
        step = by(plain_step(objects))
        return [step(*batch).item() for batch in batches()]

    expected = trained(lambda step: step)
    count = len(graphs)
    torch._dynamo.reset()
    config = tc.TrainingCompilerConfig(engine=engine, quiet=True, fallback="error")
    assert trained(lambda step: tc.compile(step, config)) == pytest.approx(expected, rel=1e-4)
    assert len(graphs) == (count if engine == "xla" else 2 * count)
