"""Memory that others see: other tensors, NumPy, other processes."""

import io

import numpy as np
import pytest
import torch
from parity import assert_same_training
from small import batches, made, mlp, sgd, train_on
from torch import nn
from torch.nn import functional as F

from trainingcompiler.frameworks.pytorch.interop.arrays import numpy_view
from trainingcompiler.frameworks.pytorch.state import ownership
from trainingcompiler.frameworks.pytorch.state.ownership import is_foreign, is_shared, overlapping
from trainingcompiler.frameworks.pytorch.state.shared_tensors import SharedTensor


def kinds(tensor: torch.Tensor) -> str:
    return "foreign" if is_foreign(tensor) else "shared" if is_shared(tensor) else "own"


def loaded(**options) -> torch.Tensor:
    file = io.BytesIO()
    torch.save(torch.ones(3, 4), file)
    file.seek(0)
    return torch.load(file, **options)


def test_this_torch_can_be_read():
    assert ownership._known_deleters() is not None


@pytest.mark.parametrize(
    "tensor",
    [
        lambda: torch.ones(3, 4),
        lambda: nn.Parameter(torch.ones(3, 4)),
        loaded,
        lambda: torch.from_numpy(np.ones((3, 4))),  # nobody else has the array
        lambda: torch.from_numpy(np.arange(12.0).reshape(3, 4)),
        lambda: torch.frombuffer(bytearray(16), dtype=torch.float32),
    ],
)
def test_memory_of_its_own(tensor):
    assert kinds(tensor()) == "own"


def test_memory_that_numpy_sees():
    array, buffer = np.ones((3, 4)), bytearray(16)
    assert kinds(torch.from_numpy(array)) == kinds(torch.as_tensor(array)) == "foreign"
    assert kinds(torch.from_numpy(array[:2])) == kinds(nn.Parameter(torch.from_numpy(array))) == "foreign"
    assert kinds(torch.frombuffer(buffer, dtype=torch.float32)) == "foreign"
    tensor = torch.from_numpy(array)
    del array
    assert kinds(tensor) == "own"


def test_memory_that_was_given_to_numpy():
    tensor = torch.ones(3)
    array = tensor.numpy()
    assert kinds(tensor) == "foreign"
    del array
    assert kinds(tensor) == "own"


def test_our_own_look_leaves_no_trace():
    for dtype in (torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.complex64):
        tensor = torch.ones(3, 4).to(dtype)
        array = numpy_view(tensor)
        assert array.shape == (3, 4) and kinds(tensor) == "shared"
        del array
        assert kinds(tensor) == "own" and tensor.untyped_storage().resizable()


def test_memory_that_other_processes_see(tmp_path):
    model = nn.Linear(3, 4)
    model.share_memory()
    assert kinds(model.weight) == "foreign"
    assert kinds(torch.from_file(str(tmp_path / "file"), shared=True, size=8)) == "foreign"


def test_memory_that_other_tensors_see():
    tensor = nn.Parameter(torch.ones(3, 4))
    for other in (lambda: tensor.data, lambda: tensor.detach(), lambda: tensor.detach()[0], lambda: tensor.view(-1)):
        held = other()
        assert kinds(tensor) == "shared"
        del held
        assert kinds(tensor) == "own"
    assert kinds(torch.ones(12)[:4]) == "shared"


def test_memory_of_a_compiled_step_is_its_own():
    tensor = nn.Parameter(torch.ones(3, 4))
    shared = SharedTensor(tensor)
    shared.array(None)
    assert kinds(tensor) == "own" and not shared.stays


def test_without_knowing_torchs_storages_all_memory_but_torchs_own_is_foreign(monkeypatch):
    monkeypatch.setattr(ownership, "_known_deleters", lambda: None)
    assert kinds(torch.ones(3)) == "own"
    assert kinds(torch.from_numpy(np.ones(3))) == "foreign"


def test_tensors_over_one_memory_are_found():
    flat = torch.zeros(12)
    a, b, c = flat[:6], flat[6:], flat[4:8]
    assert overlapping([a, b], [torch.zeros(3), torch.zeros(0)]) is None
    assert overlapping([], [a, c]) is None and overlapping([torch.zeros(2)], [a, c]) is None  # nobody writes to these
    for written, others in (([a, c], []), ([a], [b, c]), ([c], [a]), ([b, a], [c])):
        found = overlapping(written, others)
        assert found is not None and any(found[0] is one for one in written)
    assert overlapping([flat.view(3, 4).t()], [b]) is not None


# -- loops ------------------------------------------------------------------------------------------------------


def test_references_by_data_see_every_step():
    def loop(objects, data):
        model, seen = objects["model"], []
        references = [p.data for p in model.parameters()]
        for number, batch in enumerate(data):
            seen += train_on(model, objects["optimizer"], [batch])
            seen += [reference.sum().item() for reference in references]
            if number % 5 == 4:
                references[0].mul_(0.9)
        return seen

    assert_same_training(sgd(), loop, batches(), max_compiles=1)


def test_a_flat_buffer():
    def make():
        objects = sgd()()
        parameters = list(objects["model"].parameters())
        objects["flat"] = nn.ParameterList([torch.cat([p.detach().reshape(-1) for p in parameters])])
        start, flat = 0, objects["flat"][0].data
        for p in parameters:
            p.data = flat[start : start + p.numel()].view_as(p)
            start += p.numel()
        return objects

    def loop(objects, data):
        seen = []
        for batch in data:
            seen += train_on(objects["model"], objects["optimizer"], [batch])
            objects["flat"][0].data.mul_(0.99)
            seen.append(objects["flat"][0].sum().item())
        return seen

    assert_same_training(make, loop, batches(), max_compiles=1)


def test_two_parameters_over_one_memory_are_torchs():
    """What the one update writes, the other would not read: one of the two would be lost."""

    def make():
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
        model[2].weight.data = model[0].weight.data
        return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}

    def loop(objects, data):
        return train_on(objects["model"], objects["optimizer"], data)

    run = assert_same_training(make, loop, batches(), may_fall_back=True)
    (said,) = run.fallbacks()
    assert said.reason == (
        "two tensors of the step, of shapes [8, 8] and [8, 8], lie in the same memory (`b.data = a.data`), to which it "
        "writes; `b = a`, one parameter in two places, is compiled"
    )


def test_a_tie_made_in_mid_run_by_data():
    def make():
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
        return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}

    def loop(objects, data):
        model = objects["model"]
        seen = train_on(model, objects["optimizer"], data[:12])
        model[2].weight.data = model[0].weight.data
        return seen + train_on(model, objects["optimizer"], data[12:])

    run = assert_same_training(make, loop, batches(), may_fall_back=True)
    assert run.statistics.compiled_steps >= 11 and len(run.fallbacks()) == 1


def test_a_reference_that_the_step_reads_beside_what_it_writes():
    def loop(objects, data):
        model, optimizer, seen = objects["model"], objects["optimizer"], []
        reference = model[0].weight.data
        for x, y in data:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y) + F.mse_loss(model[0].weight, reference * 0.9)
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
        return seen

    assert_same_training(sgd(), loop, batches(), may_fall_back=True)


@pytest.mark.parametrize("when", [0, 12])
def test_parameters_that_other_processes_see_are_torchs(when):
    """Others may write to them at any moment (Hogwild), which a step that copies would undo."""

    def loop(objects, data):
        model = objects["model"]
        seen = train_on(model, objects["optimizer"], data[:when])
        model.share_memory()
        seen += train_on(model, objects["optimizer"], data[when:])
        return [*seen, float(all(p.is_shared() for p in model.parameters()))]

    run = assert_same_training(sgd(), loop, batches(), may_fall_back=True)
    (said,) = run.fallbacks()
    assert said.reason == (
        "a parameter of shape [32, 8] that the step updates lies in memory that NumPy or another process sees too, and "
        "may write to; `p.data = p.data.clone()` gives it memory of its own, to be compiled"
    )
    assert run.statistics.compiled_steps == when


def test_a_parameter_over_a_numpy_array():
    arrays = []

    def make():
        model = mlp()
        arrays[:] = [np.random.default_rng(0).standard_normal((32, 8)).astype(str(torch.get_default_dtype())[6:])]
        model[0].weight = nn.Parameter(torch.from_numpy(arrays[0]))
        return made(lambda: model, torch.optim.SGD, lr=0.1)()

    def loop(objects, data):
        seen = []
        for x, y in data:
            objects["optimizer"].zero_grad()
            loss = F.cross_entropy(objects["model"](x), y)
            arrays[0] *= 0.9  # backward sees it, and forward did not
            loss.backward()
            objects["optimizer"].step()
            seen += [loss.item(), float(arrays[0].sum())]
        return seen

    run = assert_same_training(make, loop, batches(), may_fall_back=True)
    assert len(run.fallbacks()) == 1


def test_an_array_that_nobody_else_has_is_compiled():
    def make():
        model = mlp()
        model[0].weight = nn.Parameter(torch.from_numpy(np.full((32, 8), 0.1)).to(torch.get_default_dtype()))
        return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}

    def loop(objects, data):
        return train_on(objects["model"], objects["optimizer"], data)

    assert_same_training(make, loop, batches(), max_compiles=1)


def test_a_buffer_over_a_numpy_array_is_read_anew_at_each_step():
    table = np.ones(8)

    def make():
        table[:] = 1.0
        model = mlp()
        model.register_buffer("table", torch.from_numpy(table))
        return {"model": Scaled(model), "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}

    class Scaled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x * self.inner.table.to(x.dtype))

    def loop(objects, data):
        seen = []
        for batch in data:
            seen += train_on(objects["model"], objects["optimizer"], [batch])
            table[:] += 0.1
        return seen

    assert_same_training(make, loop, batches(), max_compiles=1)


def test_an_optimizer_that_assigns_data_is_torchs():
    class Plain(torch.optim.Optimizer):
        def __init__(self, parameters, lr):
            super().__init__(parameters, {"lr": lr})

        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.data = p.data - group["lr"] * p.grad.data

    def loop(objects, data):
        return train_on(objects["model"], objects["optimizer"], data)

    run = assert_same_training(made(mlp, Plain, lr=0.1), loop, batches(), may_fall_back=True)
    assert run.fallbacks()


class OverNumpy(nn.Module):
    """Reads memory that NumPy writes to, while forward runs and after it: as a constant, and as a buffer."""

    def __init__(self, is_buffer):
        super().__init__()
        self.array = np.zeros(4)
        shift = torch.from_numpy(self.array)
        if is_buffer:
            self.register_buffer("shift", shift)
        else:
            self.shifts = [shift]
        self.layer = nn.Linear(8, 4)

    def forward(self, x):
        shift = self.shift if hasattr(self, "shift") else self.shifts[0]
        self.array[:] = 0.1
        hidden = self.layer(x) + shift
        self.array[:] = 0.7
        return torch.tanh(hidden) + shift  # a sum: eager's backward reads nothing of it


@pytest.mark.parametrize("is_buffer", [False, True])
def test_what_numpy_writes_between_two_calls_of_a_step(is_buffer):
    def loop(objects, data):
        losses = []
        for x, y in data:
            objects["optimizer"].zero_grad()
            loss = F.cross_entropy(objects["model"](x), y)
            objects["model"].array[:] = 10.0  # before anything has run
            loss.backward()
            objects["optimizer"].step()
            losses.append(loss.item())
        return losses

    make = made(lambda: OverNumpy(is_buffer), torch.optim.SGD, lr=0.1)
    assert_same_training(make, loop, batches(), max_compiles=2, dtypes=(torch.float64,))
