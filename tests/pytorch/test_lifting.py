"""Tensors and numbers that no program got as an argument: what changes between steps counts, nothing is baked in."""

import pytest
import torch
from parity import assert_same_training
from small import batches, made, mlp, sgd, train_on
from torch import nn
from torch.nn import functional as F


class WithConstants(nn.Module):
    """Holds tensors that are neither parameters nor buffers."""

    def __init__(self):
        super().__init__()
        self.net = mlp()
        self.mask = torch.ones(8)
        self.table = {"scale": torch.full((4,), 2.0)}

    def forward(self, x):
        weights = torch.tensor([1.0, 0.5, 2.0, 1.5])
        return self.net(x * self.mask) * self.table["scale"] * weights


def trained(objects, x, y):
    objects["optimizer"].zero_grad()
    loss = F.cross_entropy(objects["model"](x), y)
    loss.backward()
    objects["optimizer"].step()
    return loss.item()


def in_place(model, step):
    model.mask[step % 8] = step % 3


def replaced(model, step):
    model.mask = torch.full((8,), 1.0 + step % 3)


def in_a_dictionary(model, step):
    model.table["scale"] = torch.full((4,), 1.0 + step % 3)


def filled(model, step):
    model.table["scale"].fill_(step % 4)


@pytest.mark.parametrize("change", [in_place, replaced, in_a_dictionary, filled], ids=lambda change: change.__name__)
def test_module_constants_changed_between_steps(change):
    def loop(objects, data):
        losses = []
        for step, (x, y) in enumerate(data):
            losses.append(trained(objects, x, y))
            if step % 4 == 3:
                change(objects["model"], step)
        return losses

    in_memory = change in (in_place, filled)
    assert_same_training(
        made(WithConstants, torch.optim.SGD, lr=0.1), loop, batches(), max_compiles=1 if in_memory else None
    )


@pytest.mark.parametrize("in_forward", [True, False])
def test_closed_over_mask_changed_between_steps(in_forward):
    def make():
        mask = torch.ones(8)

        class Masked(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = mlp()

            def forward(self, x):
                return self.net(x * mask if in_forward else x)

        model = Masked()
        return {"model": model, "mask": mask, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}

    def loop(objects, data):
        mask, losses = objects["mask"], []
        for step, (x, y) in enumerate(data):
            mask[step % 8] = float(step % 2)
            objects["optimizer"].zero_grad()
            outputs = objects["model"](x)
            loss = (F.cross_entropy(outputs, y, reduction="none").view(-1, 8) * mask).mean()
            loss.backward()
            mask.mul_(0.9)  # before the step runs: the calls saw what was there
            objects["optimizer"].step()
            losses.append(loss.item())
        return losses

    assert_same_training(make, loop, batches(), max_compiles=1)


def test_inputs_overwritten_after_the_call():
    def loop(objects, data):
        losses, label = [], torch.zeros(16, dtype=torch.int64)
        buffer = torch.empty_like(data[0][0])
        for x, y in data:
            buffer.copy_(x)
            label.copy_(y)
            objects["optimizer"].zero_grad()
            loss = F.cross_entropy(objects["model"](buffer), label)
            loss.backward()
            buffer.fill_(7.0)
            label.zero_()
            objects["optimizer"].step()
            losses.append(loss.item())
        return losses

    assert_same_training(sgd(), loop, batches(), max_compiles=1)


TOTALS = {
    "in place": lambda total, loss: total.__iadd__(loss),
    "add_": lambda total, loss: total.add_(loss, alpha=0.5),
    "detached": lambda total, loss: total.__iadd__(loss.detach()),
    "sum": lambda total, loss: total + loss.detach(),
    "item": lambda total, loss: total + loss.item(),
    "data": lambda total, loss: total.__iadd__(loss.data * 2),
}


@pytest.mark.parametrize("add", TOTALS.values(), ids=TOTALS)
@pytest.mark.parametrize("when", ["before backward", "after step"])
def test_running_total(add, when):
    def loop(objects, data):
        total, seen = torch.zeros(()), []
        for step, (x, y) in enumerate(data):
            objects["optimizer"].zero_grad()
            loss = F.cross_entropy(objects["model"](x), y)
            if when == "before backward":
                with torch.no_grad():
                    total = add(total, loss)
            loss.backward()
            objects["optimizer"].step()
            if when == "after step":
                with torch.no_grad():
                    total = add(total, loss)
            if step % 6 == 5:
                seen.append(total.item())
                total.zero_()
        return seen

    assert_same_training(sgd(), loop, batches(), max_compiles=4)


def test_running_total_that_others_see():
    """`total += loss` is seen through every name of the tensor."""

    def loop(objects, data):
        total = torch.zeros(())
        logs = {"total": total}
        for x, y in data:
            objects["optimizer"].zero_grad()
            loss = F.cross_entropy(objects["model"](x), y)
            total += loss.detach()
            loss.backward()
            objects["optimizer"].step()
        return [logs["total"].item(), float(total is logs["total"])]

    assert_same_training(sgd(), loop, batches(), max_compiles=2)


def test_results_written_into_a_tensor_of_the_loop():
    def loop(objects, data):
        history = torch.zeros(len(data))
        predictions = torch.zeros(len(data), 16, dtype=torch.int64)
        for step, (x, y) in enumerate(data):
            objects["optimizer"].zero_grad()
            outputs = objects["model"](x)
            loss = F.cross_entropy(outputs, y)
            loss.backward()
            objects["optimizer"].step()
            history[step] = loss.detach()
            predictions[step] = outputs.argmax(1)
        return [*history.tolist(), predictions.double().sum().item()]

    assert_same_training(sgd(), loop, batches(), max_compiles=1)


def test_a_leaf_outside_of_the_optimizer_gets_its_gradient():
    def loop(objects, data):
        temperature = torch.ones((), requires_grad=True)
        seen = []
        for x, y in data:
            objects["optimizer"].zero_grad()
            temperature.grad = None
            loss = F.cross_entropy(objects["model"](x) / temperature, y)
            loss.backward()
            objects["optimizer"].step()
            with torch.no_grad():
                temperature -= 0.05 * temperature.grad
            seen += [loss.item(), temperature.item()]
        return seen

    assert_same_training(sgd(), loop, batches(), max_compiles=2)


def test_an_input_that_requires_a_gradient():
    def loop(objects, data):
        seen = []
        for x, y in data:
            x.requires_grad_()
            objects["optimizer"].zero_grad()
            loss = F.cross_entropy(objects["model"](x), y)
            loss.backward()
            objects["optimizer"].step()
            seen += [loss.item(), x.grad.norm().item()]
        return seen

    assert_same_training(sgd(), loop, batches())


@pytest.mark.parametrize("order", ["before the call", "after the call"])
def test_a_penalty_made_of_plain_parameters_counts(order):
    def loop(objects, data):
        losses = []
        for x, y in data:
            objects["optimizer"].zero_grad()
            if order == "before the call":
                penalty = sum(p.pow(2).sum() for p in objects["model"].parameters())
            loss = F.cross_entropy(objects["model"](x), y)
            if order == "after the call":
                penalty = sum(p.pow(2).sum() for p in objects["model"].parameters())
            loss = loss + 1e-2 * penalty
            loss.backward()
            objects["optimizer"].step()
            losses.append(loss.item())
        return losses

    assert_same_training(sgd(), loop, batches(), may_fall_back=True)


class Quantizer(nn.Module):
    """Assigns its codes' memory in the forward that reads them."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 3), nn.Linear(3, 4)
        self.codes = nn.Parameter(torch.randn(6, 3), requires_grad=False)
        self.register_buffer("sums", torch.randn(6, 3))

    def forward(self, x):
        z = self.first(x)
        nearest = (z[:, None] - self.codes[None]).pow(2).sum(-1).argmin(1)
        chosen = F.one_hot(nearest, 6).to(z.dtype)
        self.sums.mul_(0.9).add_((chosen.T @ z).detach(), alpha=0.1)
        self.codes.data = self.sums / (1 + chosen.sum(0))[:, None]
        quantized = chosen @ self.codes.detach()
        return self.last(z + (quantized - z).detach())


def test_memory_assigned_in_a_forward():
    def loop(objects, data):
        return train_on(objects["model"], objects["optimizer"], data)

    assert_same_training(sgd(Quantizer), loop, batches(), may_fall_back=True, dtypes=(torch.float64,))
