"""Parameters that the loop edits between steps, in every way torch offers."""

import copy

import pytest
import torch
from parity import assert_same_training
from small import batches, made, mlp, sgd, train_on
from torch import nn
from torch.nn import functional as F


def moving_average(model, extra):
    average = extra.setdefault("average", copy.deepcopy(model).requires_grad_(False))
    with torch.no_grad():
        for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
            slow.lerp_(fast, 0.1)


def clamp(model, extra):
    with torch.no_grad():
        for p in model.parameters():
            p.clamp_(-0.3, 0.3)


def decay_data(model, extra):
    for p in model.parameters():
        p.data.mul_(0.99)


def replace_data(model, extra):
    for p in model.parameters():
        p.data = p.data * 0.9 + 0.01


def copy_in(model, extra):
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p / (1 + p.norm()))


def one_element(model, extra):
    with torch.no_grad():
        model[0].weight[1, 2] = 0.25


def one_element_through_data(model, extra):
    model[0].bias.data[0] += 0.1


def reset_a_layer(model, extra):
    if len(extra) == 0:
        nn.init.zeros_(model[3].weight)
    extra["reset"] = True


def as_a_vector(model, extra):
    vector = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(vector * 0.95, model.parameters())


def through_numpy(model, extra):
    model[3].bias.detach().numpy()[:] *= 0.5


def swap_and_back(model, extra):
    saved = [p.data for p in model.parameters()]
    for p in model.parameters():
        p.data = p.data.sign()
    with torch.no_grad():
        extra["outside"] = model(torch.ones(2, 8)).sum().item()
    for p, data in zip(model.parameters(), saved, strict=True):
        p.data = data


EDITS = (
    moving_average,
    clamp,
    decay_data,
    replace_data,
    copy_in,
    one_element,
    one_element_through_data,
    reset_a_layer,
    as_a_vector,
    through_numpy,
    swap_and_back,
)


def trained_with_edits(edit, every):
    def loop(objects, data):
        extra, seen = {}, []
        for step, (x, y) in enumerate(data):
            seen += train_on(objects["model"], objects["optimizer"], [(x, y)])
            if step % every == every - 1:
                edit(objects["model"], extra)
        if "average" in extra:
            objects["average"] = extra["average"]
        return seen

    return loop


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_parameters_edited_after_every_step(edit):
    assert_same_training(sgd(), trained_with_edits(edit, 1), batches(), max_compiles=2)


@pytest.mark.parametrize("edit", [moving_average, replace_data, swap_and_back], ids=lambda edit: edit.__name__)
def test_parameters_edited_now_and_then(edit):
    assert_same_training(sgd(), trained_with_edits(edit, 5), batches(), max_compiles=2)


@pytest.mark.parametrize("edit", [clamp, decay_data, replace_data, copy_in], ids=lambda edit: edit.__name__)
def test_parameters_edited_between_backward_and_step(edit):
    """Weight decay by hand: the gradients are those of the parameters before the edit."""

    def loop(objects, data):
        losses = []
        for x, y in data:
            objects["optimizer"].zero_grad()
            loss = F.cross_entropy(objects["model"](x), y)
            loss.backward()
            edit(objects["model"], {})
            objects["optimizer"].step()
            losses.append(loss.item())
        return losses

    assert_same_training(sgd(), loop, batches(), max_compiles=4, may_fall_back=True)


@pytest.mark.parametrize("step", [1, 5])
def test_a_write_that_no_guard_sees(step):
    """Under a mode of the script's own the guard cannot watch; torch's counts of writes are compared instead."""

    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        losses = train_on(model, optimizer, data[:step])
        with torch.device("cpu"):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(data[step][0]), data[step][1])
            with torch.no_grad():
                model[3].weight.add_(1.0)
            with pytest.raises(RuntimeError, match="modified"):  # "by an inplace operation", in torch's own words
                loss.backward()
                optimizer.step()
            model[3].weight.data.sub_(1.0)
        return losses + train_on(model, optimizer, data[step:])

    run = assert_same_training(made(mlp, torch.optim.Adam, lr=0.01), loop, batches())
    assert not run.fallbacks()
