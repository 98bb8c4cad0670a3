"""Several models, several calls, several losses in one step."""

import pytest
import torch
from parity import assert_same_training
from small import batches, made, mlp, sgd
from torch import nn
from torch.nn import functional as F


def pair():
    one, two = mlp(), mlp()
    return {
        "one": one,
        "two": two,
        "first": torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9),
        "second": torch.optim.AdamW(two.parameters(), lr=0.01),
    }


@pytest.mark.parametrize("order", ["each after its backward", "both at the end"])
def test_two_models_two_optimizers(order):
    def loop(objects, data):
        losses = []
        for x, y in data:
            objects["first"].zero_grad()
            objects["second"].zero_grad()
            loss_one = F.cross_entropy(objects["one"](x), y)
            loss_two = F.cross_entropy(objects["two"](x), y)
            loss_one.backward()
            if order == "each after its backward":
                objects["first"].step()
            loss_two.backward()
            if order == "both at the end":
                objects["first"].step()
            objects["second"].step()
            losses += [loss_one.item(), loss_two.item()]
        return losses

    assert_same_training(pair, loop, batches(), max_compiles=2 if order == "both at the end" else 1)


def test_teacher_and_student():
    def loop(objects, data):
        teacher, student = objects["one"].eval(), objects["two"]
        losses = []
        for x, _ in data:
            with torch.no_grad():
                targets = teacher(x).softmax(-1)
            objects["second"].zero_grad()
            loss = F.kl_div(F.log_softmax(student(x), -1), targets, reduction="batchmean")
            loss.backward()
            objects["second"].step()
            losses.append(loss.item())
        return losses

    assert_same_training(pair, loop, batches(), max_compiles=2)


def test_one_loss_through_two_models():
    def loop(objects, data):
        losses = []
        for x, y in data:
            objects["first"].zero_grad()
            objects["second"].zero_grad()
            loss = F.cross_entropy(objects["one"](x) + objects["two"](x).detach().tanh() * objects["two"](x), y)
            loss.backward()
            objects["first"].step()
            objects["second"].step()
            losses.append(loss.item())
        return losses

    assert_same_training(pair, loop, batches(), max_compiles=2)


def test_one_optimizer_for_two_models():
    def make():
        one, two = nn.Linear(8, 16), nn.Linear(16, 4)
        return {"one": one, "two": two, "optimizer": torch.optim.SGD([*one.parameters(), *two.parameters()], lr=0.1)}

    def loop(objects, data):
        losses = []
        for x, y in data:
            objects["optimizer"].zero_grad()
            loss = F.cross_entropy(objects["two"](torch.relu(objects["one"](x))), y)
            loss.backward()
            objects["optimizer"].step()
            losses.append(loss.item())
        return losses

    assert_same_training(make, loop, batches(), max_compiles=1)


def test_one_model_called_twice():
    def loop(objects, data):
        losses = []
        for x, _ in data:
            objects["optimizer"].zero_grad()
            one, two = objects["model"](x), objects["model"](x.flip(0))
            similarity = F.cosine_similarity(one, two, dim=-1)
            loss = (1 - similarity).mean() + (one - two).pow(2).mean()
            loss.backward()
            objects["optimizer"].step()
            losses += [loss.item(), similarity.max().item()]
        return losses

    assert_same_training(sgd(), loop, batches(), max_compiles=1)


def test_a_model_called_on_its_own_output():
    def loop(objects, data):
        losses = []
        for x, _ in data:
            hidden = x
            for _ in range(3):
                hidden = objects["model"](hidden)
            loss = (hidden - x).abs().mean()
            objects["optimizer"].zero_grad()
            loss.backward()
            objects["optimizer"].step()
            losses.append(loss.item())
        return losses

    cell = made(lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh()), torch.optim.SGD, lr=0.1)
    assert_same_training(cell, loop, batches(), max_compiles=1)


@pytest.mark.parametrize("read", [False, True])
def test_two_losses_two_backwards(read):
    def loop(objects, data):
        seen = []
        for x, y in data:
            objects["optimizer"].zero_grad()
            outputs = objects["model"](x)
            loss = F.cross_entropy(outputs, y)
            penalty = outputs.pow(2).mean()
            loss.backward(retain_graph=True)
            if read:
                seen.append(loss.item())
            penalty.backward()
            objects["optimizer"].step()
            seen += [loss.item(), penalty.item()]
        return seen

    # A look between the backwards: the part before it twice (to look, and with its backward), and the rest.
    assert_same_training(sgd(), loop, batches(), max_compiles=3 if read else 1)


def test_two_losses_of_disjoint_outputs():
    """The graphs behind two outputs of one call need not have anything in common."""

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.policy, self.value = nn.Linear(8, 4), nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 1))

        def forward(self, x):
            return self.policy(x), self.value(x)

    def loop(objects, data):
        seen = []
        for x, y in data:
            objects["optimizer"].zero_grad()
            policy, value = objects["model"](x)
            loss, error = F.cross_entropy(policy, y), (value.squeeze(1) - y).pow(2).mean()
            loss.backward()
            error.backward()
            objects["optimizer"].step()
            seen += [loss.item(), error.item()]
        return seen

    assert_same_training(made(Heads, torch.optim.SGD, lr=0.05), loop, batches(), may_fall_back=True)


def test_two_losses_of_two_calls_two_backwards():
    def loop(objects, data):
        seen = []
        for x, y in data:
            objects["optimizer"].zero_grad()
            loss = F.cross_entropy(objects["model"](x), y)
            loss.backward()
            penalty = objects["model"](x + 0.1).pow(2).mean()
            penalty.backward()
            objects["optimizer"].step()
            seen += [loss.item(), penalty.item()]
        return seen

    assert_same_training(sgd(), loop, batches(), max_compiles=2)


def test_backward_of_a_vector_and_of_several():
    def loop(objects, data):
        seen = []
        for step, (x, y) in enumerate(data):
            objects["optimizer"].zero_grad()
            losses = F.cross_entropy(objects["model"](x), y, reduction="none")
            if step % 2:
                losses.backward(torch.full((len(x),), 1 / len(x)))
            else:
                torch.autograd.backward([losses[:8].mean(), losses[8:].mean()])
            objects["optimizer"].step()
            seen.append(losses.mean().item())
        return seen

    assert_same_training(sgd(), loop, batches(), max_compiles=2)


class Parts(nn.Module):
    """A model whose parts the loop calls itself."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh())
        self.heads = nn.ModuleDict({"a": nn.Linear(16, 4), "b": nn.Linear(16, 2)})

    def embed(self, x):
        return self.encoder(x) * 2.0


def test_parts_called_one_after_the_other():
    def loop(objects, data):
        model, losses = objects["model"], []
        for x, y in data:
            objects["optimizer"].zero_grad()
            hidden = model.embed(x)
            loss = F.cross_entropy(model.heads["a"](hidden), y) + F.cross_entropy(model.heads["b"](hidden), y % 2)
            loss.backward()
            objects["optimizer"].step()
            losses.append(loss.item())
        return losses

    assert_same_training(made(Parts, torch.optim.AdamW, lr=0.01), loop, batches(), max_compiles=1)


def test_parts_called_by_turns():
    """Each step trains one head: the other has no gradient, and its optimizer state does not move."""

    def loop(objects, data):
        model, losses = objects["model"], []
        for step, (x, y) in enumerate(data):
            head = "ab"[step % 2]
            objects["optimizer"].zero_grad()
            loss = F.cross_entropy(model.heads[head](model.embed(x)), y % 2)
            loss.backward()
            objects["optimizer"].step()
            losses.append(loss.item())
        return losses

    assert_same_training(made(Parts, torch.optim.AdamW, lr=0.01), loop, batches(), max_compiles=2)
