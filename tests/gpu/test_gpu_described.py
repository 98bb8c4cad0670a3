"""Capturing a training step without training: the program is the one that trains."""

import copy

import jax
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from trainingcompiler.compiling import compiler
from trainingcompiler.errors import CaptureError, UsageError
from trainingcompiler.frameworks.pytorch.aot.step_program import compile_step, step_program
from trainingcompiler.parallel.arrays import owned_array
from trainingcompiler.targets.target import Target


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def loss_of(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["y"])


def batch():
    torch.manual_seed(1)
    return {"x": torch.randn(8, 6), "y": torch.randint(3, (8,))}


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "plain sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    "fused adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.1, centered=True),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_what_a_real_step_creates(name):
    model = classifier()
    optimizer = OPTIMIZERS[name](model.parameters())
    before = copy.deepcopy(model.state_dict())
    state_before = copy.deepcopy(optimizer.state_dict())
    program = step_program(model, optimizer, loss_of, batch())

    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert str(optimizer.state_dict()) == str(state_before)  # nothing is left behind

    loss_of(model, batch()).backward()
    optimizer.step()
    stored = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    expected = sum(t.nbytes for t in [*stored, *model.parameters(), *model.buffers()])
    assert sum(spec.size_bytes for spec in program.state) == expected


def test_the_program_is_the_step():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))  # no two parameters of one shape
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    executable = compile_step(model, optimizer, loss_of, batch(), Target.local())
    program = executable.program
    values = {tuple(p.shape): p.detach().numpy().copy() for p in model.parameters()}
    given = {"batch": iter([t.numpy() for t in batch().values()]), "rng": iter([np.zeros(1, np.int64)])}
    given["hyperparameter"] = iter([np.array([0.1])])
    state = tuple(owned_array(values[spec.shape]) for spec in program.state)
    with jax.enable_x64(True):
        new_state, (loss, *_) = executable(state, tuple(next(given[spec.role]) for spec in program.inputs))

    expected = loss_of(model, batch())
    expected.backward()
    optimizer.step()
    assert float(loss) == pytest.approx(expected.item(), rel=1e-6)
    for parameter in model.parameters():
        (new,) = (array for array in new_state if array.shape == tuple(parameter.shape))
        np.testing.assert_allclose(new, parameter.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_a_step_that_trains_nothing_is_refused():
    one, other = nn.Linear(6, 3), nn.Linear(6, 3)
    with pytest.raises(UsageError, match="the step changes nothing"):
        step_program(one, torch.optim.SGD(other.parameters(), lr=0.1), loss_of, batch())
    with pytest.raises(CaptureError, match="does not require grad"):
        step_program(one.requires_grad_(False), torch.optim.SGD(other.parameters(), lr=0.1), loss_of, batch())


def test_values_do_not_matter():
    """A model in untouched memory is enough: what is captured are shapes."""
    model = nn.utils.skip_init(nn.Linear, 6, 3)
    program = step_program(model, torch.optim.Adam(model.parameters()), loss_of, batch())
    with jax.enable_x64(True):
        shapes = jax.eval_shape(
            program.function,
            *(
                tuple(jax.ShapeDtypeStruct(spec.shape, np.dtype(spec.dtype)) for spec in specs)
                for specs in (program.state, program.inputs)
            ),
        )
    assert [array.shape for array in shapes[0]] == [spec.shape for spec in program.state]


def test_the_same_program_for_two_targets():
    model = classifier()
    program = step_program(model, torch.optim.Adam(model.parameters()), loss_of, batch())
    one, two = compiler.compile(program), compiler.compile(program, Target.local())
    assert one.memory == two.memory
