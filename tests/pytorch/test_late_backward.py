"""A backward that comes after a step: torch differentiates what that has not written to, and refuses the rest."""

import pytest
import torch
from parity import assert_same_training
from small import batches, made, mlp
from torch import nn
from torch.nn import functional as F

FLOAT64 = (torch.float64,)


def delayed(objects, data):
    """Each step takes the gradient of the batch before."""
    model, optimizer, losses, last = objects["model"], objects["optimizer"], [], None
    for x, y in data:
        loss = F.cross_entropy(model(x), y)
        if last is not None:
            optimizer.zero_grad()
            last.backward()
            optimizer.step()
            losses.append(last.item())
        last = loss
    return losses


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_a_linear_layers_gradient_needs_no_weight(optimizer):
    make = made(lambda: nn.Linear(8, 4), optimizer, lr=0.1)
    assert_same_training(make, delayed, batches(), dtypes=FLOAT64, may_fall_back=True)


def test_what_a_gradient_needs_and_a_step_has_written_to_is_refused():
    def loop(objects, data):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            delayed(objects, data)
        return [1.0]

    assert_same_training(made(mlp, torch.optim.SGD, lr=0.1), loop, batches(), dtypes=FLOAT64, may_fall_back=True)


def test_two_steps_of_two_losses_of_one_model():
    def loop(objects, data):
        model, optimizer, losses = objects["model"], objects["optimizer"], []
        for x, y in data:
            first, second = F.cross_entropy(model(x[:8]), y[:8]), F.cross_entropy(model(x[8:]), y[8:])
            for loss in (first, second):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        return losses

    make = made(lambda: nn.Linear(8, 4), torch.optim.SGD, lr=0.1)
    assert_same_training(make, loop, batches(), dtypes=FLOAT64, may_fall_back=True)


@pytest.mark.parametrize("between", ["zero_grad", "step"])
def test_a_branch_that_was_detached_is_differentiated_after_the_other(between):
    """A generator before its discriminator, a critic on detached features."""

    def loop(objects, data):
        encoder, head, losses = objects["model"]["encoder"], objects["model"]["head"], []
        ours, theirs = (torch.optim.SGD(module.parameters(), lr=0.1) for module in (encoder, head))
        for x, y in data:
            hidden = encoder(x)
            loss = F.cross_entropy(head(hidden.detach()), y)
            ours.zero_grad()
            hidden.pow(2).mean().backward()
            if between == "step":
                ours.step()
            theirs.zero_grad()
            loss.backward()
            if between == "zero_grad":
                ours.step()
            theirs.step()
            losses.append(loss.item())
        return losses

    def make():
        return {"model": nn.ModuleDict({"encoder": nn.Linear(8, 6), "head": nn.Linear(6, 4)})}

    assert_same_training(make, loop, batches(), dtypes=FLOAT64, may_fall_back=True)
