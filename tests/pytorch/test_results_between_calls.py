"""Results that live between calls: in modules, in buffers, in stages of a model, with agents that act."""

import pytest
import torch
from parity import assert_same_training
from small import batches, made, mlp, one_step
from torch import nn
from torch.nn import functional as F

FLOAT64 = (torch.float64,)  # as in test_recording.py: a path that is mistaken for another shows in every digit


def parts_of_a_leaf(model, x):
    model[0].weight[0].mul_(2)


def one_of_several_parts(model, x):
    first, second, *_ = model(x).unbind(1)
    first.mul_(second.detach())


@pytest.mark.parametrize("writes", [parts_of_a_leaf, one_of_several_parts])
def test_a_write_that_autograd_forbids_raises_where_it_is_made(writes):
    def loop(objects, data):
        model, optimizer, seen = objects["model"], objects["optimizer"], []
        for index, (x, y) in enumerate(data):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            if index % 4 == 3:
                with pytest.raises(RuntimeError, match="a view"):
                    writes(model, x)
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
        return seen

    make = made(mlp, torch.optim.SGD, lr=0.1)
    assert_same_training(make, loop, batches(12), dtypes=FLOAT64, may_fall_back=True)


def test_a_model_cut_into_stages_each_with_a_backward_of_its_own():
    """The gradient of each cut is read, so that torch runs the step; its leaves must not be swapped for others."""

    def loop(objects, data):
        first, second, third = objects["model"][:2], objects["model"][2:3], objects["model"][3:]
        losses = []
        for x, y in data:
            objects["optimizer"].zero_grad()
            one = first(x)
            one_cut = one.detach().requires_grad_()
            two = second(one_cut)
            two_cut = two.detach().requires_grad_()
            loss = F.cross_entropy(third(two_cut), y)
            loss.backward()
            two.backward(two_cut.grad)
            one.backward(one_cut.grad)
            objects["optimizer"].step()
            losses.append(loss.item())
        return losses

    assert_same_training(made(mlp, torch.optim.SGD, lr=0.1), loop, batches(), dtypes=FLOAT64, may_fall_back=True)


def test_a_result_whose_gradient_was_read_may_be_trained():
    def loop(objects, data):
        model, losses = objects["model"], []
        for x, y in data[:8]:
            objects["optimizer"].zero_grad()
            hidden = model[1](model[0](x)).detach().requires_grad_()
            loss = F.cross_entropy(model[3](model[2](hidden)), y)
            loss.backward()
            losses.append(hidden.grad.abs().sum().item())
            objects["optimizer"].step()
            optimizer = torch.optim.SGD([hidden], lr=0.5)
            optimizer.step()
            losses.append(hidden.sum().item())
        return losses

    assert_same_training(made(mlp, torch.optim.SGD, lr=0.1), loop, batches(), dtypes=FLOAT64, may_fall_back=True)


class Generated(nn.Module):
    """A layer whose weights another network computes."""

    def __init__(self, within: bool):
        super().__init__()
        self.network = nn.Linear(4, 32)  # of which `target` is no part: no optimizer trains that
        layer = nn.Linear(8, 4)
        del layer.weight
        self.target = [nn.Sequential(nn.Tanh(), layer) if within else layer]
        self.layer = [layer]


@pytest.mark.parametrize("within", [False, True], ids=["the module", "a module in it"])
def test_weights_that_another_network_computes(within):
    """A result that a module has as an attribute gets its gradient, though the module's arguments are plain batches."""

    def loop(objects, data):
        model, optimizer, losses = objects["model"], objects["optimizer"], []
        z = torch.linspace(-1, 1, 4)
        for x, y in data:
            optimizer.zero_grad()
            model.layer[0].weight = model.network(z).view(4, 8)
            loss = F.cross_entropy(model.target[0](x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    assert_same_training(made(lambda: Generated(within), torch.optim.SGD, lr=0.1), loop, batches(), dtypes=FLOAT64)


def test_a_frozen_module_that_meets_a_result_in_a_closure():
    """It has no gradients of its own, so it is torch's to run; the result's history is not lost in it."""

    class Shifted(nn.Module):
        def __init__(self, given):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.5), requires_grad=False)
            self.given = given

        def forward(self, x):
            return x * self.scale + self.given[0]

    def loop(objects, data):
        model, optimizer, losses, given = objects["model"], objects["optimizer"], [], [None]
        frozen = Shifted(given)
        for x, y in data:
            optimizer.zero_grad()
            given[0] = model(x)
            loss = F.cross_entropy(frozen(x[:, :4]), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    make = made(mlp, torch.optim.SGD, lr=0.1)
    run = assert_same_training(make, loop, batches(), dtypes=FLOAT64, may_fall_back=True)
    assert [event.reason for event in run.fallbacks()] == ["a result goes into add, which torch runs"]


def test_a_loss_is_read_of_results_that_lie_in_one_buffer():
    """A buffer has a gradient history once results are written to it, and so have its parts: decoders write so."""

    def decoded(model, x, y, index):
        outputs = torch.zeros(16, 4)
        part = outputs[0]
        assert not outputs.requires_grad and not part.requires_grad and outputs.is_leaf
        for start in (0, 8):
            outputs[start : start + 8] = model(x[start : start + 8])
        assert outputs.requires_grad and outputs.view(-1).requires_grad and not outputs.is_leaf
        with torch.no_grad():
            copy = torch.zeros(16, 4)
            copy[:] = outputs
        assert not copy.requires_grad
        loss = F.cross_entropy(outputs, y)
        seen.append(loss.item())
        return loss

    seen: list[float] = []
    assert_same_training(
        made(mlp, torch.optim.SGD, lr=0.1), one_step(decoded), batches(), dtypes=FLOAT64, may_fall_back=True
    )
    half = len(seen) // 2
    assert seen[:half] == pytest.approx(seen[half:], rel=1e-9)


def test_a_target_network_that_nobody_trains_and_that_has_gradients():
    """Its result goes into the loss outside of `no_grad`, as in many a DQN: its gradients are computed, and left."""

    class Agent(nn.Module):
        def __init__(self):
            super().__init__()
            self.online, self.target = mlp(), [mlp()]  # in a list: no optimizer is given its parameters

    def loop(objects, data):
        online, (target,), optimizer = objects["model"].online, objects["model"].target, objects["optimizer"]
        target.load_state_dict(online.state_dict())
        seen = []
        for index, (x, y) in enumerate(data):
            values = online(x).gather(1, y[:, None])
            expected = 0.5 + 0.9 * target(x).max(1)[0].unsqueeze(1)
            loss = F.smooth_l1_loss(values, expected)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
            if index % 5 == 4:
                seen.append(sum(p.grad.abs().sum().item() for p in target.parameters()))
                target.load_state_dict(online.state_dict())
        return seen

    assert_same_training(made(Agent, torch.optim.Adam, lr=1e-2), loop, batches(), dtypes=FLOAT64)


def test_draws_of_an_agent_leave_nothing_on_the_tape():
    """`rsample` fills a tensor of the forward with random numbers: a write to what only that forward knows."""

    def loop(objects, data):
        model, optimizer, seen = objects["model"], objects["optimizer"], []
        torch.manual_seed(3)
        for index, (x, y) in enumerate(data):
            for row in x[: index % 7]:
                out = model(row)
                action = torch.distributions.Normal(out[:2], F.softplus(out[2:])).rsample()
                seen.append(torch.tanh(action).sum().item())
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
        return seen

    run = assert_same_training(made(mlp, torch.optim.SGD, lr=0.1), loop, batches(), dtypes=FLOAT64)
    assert run.statistics.compiles <= 8, run.statistics
