"""What loops do with gradients besides stepping: accumulate, clip, read and edit them."""

import weakref

import pytest
import torch
from parity import assert_same_training
from small import adamw, batches, made, mlp, sgd
from torch import nn
from torch.nn import functional as F

# Imported by name before anything is hooked, as scripts do.
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from trainingcompiler import GradientNotKeptError
from trainingcompiler.frameworks.pytorch.runtime.optimizer_registry import OptimizerRegistry


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("read", [False, True])
def test_accumulation(to_none, read):
    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        losses = []
        optimizer.zero_grad(set_to_none=to_none)
        for i, (x, y) in enumerate(data):
            loss = F.cross_entropy(model(x), y) / 3
            loss.backward()
            if read:
                losses.append(loss.item())
            if (i + 1) % 3 == 0:
                optimizer.step()
                optimizer.zero_grad(set_to_none=to_none)
        return [*losses, loss.item()]

    # A first micro-batch, one in the middle, and the last with the step; where the loss is read, the step alone.
    assert_same_training(sgd(), loop, batches(66), max_compiles=3)


def test_accumulation_with_a_rest():
    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        running = 0.0
        for i, (x, y) in enumerate(data):
            loss = F.cross_entropy(model(x), y)
            (loss / 4).backward()
            running += loss.item()
            if (i + 1) % 4 == 0 or i + 1 == len(data):
                clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
        return [running]

    assert_same_training(adamw(), loop, batches(82), max_compiles=4)


def test_accumulation_of_two_losses_summed():
    def loop(objects, data):
        losses = []
        for x, y in data:
            objects["optimizer"].zero_grad()
            loss = sum(F.cross_entropy(objects["model"](half), labels) for half, labels in halves(x, y))
            loss.backward()
            objects["optimizer"].step()
            losses.append(loss.item())
        return losses

    def halves(x, y):
        return zip(x.chunk(2), y.chunk(2), strict=True)

    assert_same_training(sgd(), loop, batches(), max_compiles=1)


CLIPS = {
    "norm": lambda model: nn.utils.clip_grad_norm_(model.parameters(), 0.3),
    "norm by name": lambda model: clip_grad_norm_(model.parameters(), 0.3),
    "norm, list, foreach": lambda model: nn.utils.clip_grad_norm_(list(model.parameters()), 0.3, foreach=True),
    "norm 1": lambda model: nn.utils.clip_grad_norm_(model.parameters(), max_norm=0.3, norm_type=1.0),
    "norm inf": lambda model: nn.utils.clip_grad_norm_(parameters=model.parameters(), max_norm=0.1, norm_type="inf"),
    "value": lambda model: nn.utils.clip_grad_value_(model.parameters(), 0.01),
    "value by name": lambda model: clip_grad_value_(model.parameters(), 0.01),
    "value of one": lambda model: nn.utils.clip_grad_value_(model[0].weight, clip_value=0.01),
}


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
def test_clipping(clip, request):
    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        losses = []
        for x, y in data:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            clip(model)
            optimizer.step()
            losses.append(loss.item())
        return losses

    by_name = "by name" in request.node.callspec.id  # not seen by anybody: it reads gradients, which ends a program
    assert_same_training(adamw(), loop, batches(), max_compiles=2 if by_name else 1)


@pytest.mark.parametrize("clip", [CLIPS["norm"], CLIPS["norm by name"]], ids=["attribute", "by name"])
@pytest.mark.parametrize("use", ["after step", "before step", "decides", "in torch"])
def test_the_norm_is_used(clip, use):
    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        seen = []
        for x, y in data:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            norm = clip(model)
            if use == "before step":
                seen.append(norm.item())
            if use == "decides" and not (torch.isfinite(norm) and norm > 0.2):
                continue
            optimizer.step()
            if use == "after step":
                seen.append(float(norm))
            if use == "in torch":
                seen.append((norm * 2 + 1).sqrt().item())
        return seen

    assert_same_training(sgd(), loop, batches(), max_compiles=2)


def test_clipping_part_of_the_model():
    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        norms = []
        for x, y in data:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            norms.append(nn.utils.clip_grad_norm_(model[0].parameters(), 0.1))
            norms.append(nn.utils.clip_grad_norm_(model[3].parameters(), 0.2))
            optimizer.step()
        return [norm.item() for norm in norms]

    assert_same_training(sgd(), loop, batches(), max_compiles=2)


def halve(model):
    for p in model.parameters():
        p.grad.mul_(0.5)


def replace(model):
    for p in model.parameters():
        p.grad = p.grad.sign() * 0.01


def edit_data(model):
    for p in model.parameters():
        p.grad.data.add_(p.data, alpha=1e-2)


def zero_a_row(model):
    model[0].weight.grad[3] = 0.0


def drop_one(model):
    model[0].bias.grad = None


def noise(model):
    generator = torch.Generator().manual_seed(3)
    for p in model.parameters():
        p.grad += 0.01 * torch.randn(p.shape, generator=generator)


EDITS = (halve, replace, edit_data, zero_a_row, drop_one, noise)


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_read_and_edited_between_backward_and_step(edit, to_none):
    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        norms = []
        for x, y in data:
            optimizer.zero_grad(set_to_none=to_none)
            F.cross_entropy(model(x), y).backward()
            norms.append(sum(p.grad.norm().item() for p in model.parameters()))
            edit(model)
            optimizer.step()
        return norms

    # A step on gradients that the loop itself has made may be left to torch.
    assert_same_training(sgd(), loop, batches(), max_compiles=4, may_fall_back=edit is replace)


def test_gradients_edited_now_and_then():
    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        for step, (x, y) in enumerate(data):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            if step % 4 == 0:
                halve(model)
            optimizer.step()
        return []

    assert_same_training(adamw(), loop, batches(), max_compiles=3)


def logs_gradients_after_the_step(objects, data):
    model, optimizer = objects["model"], objects["optimizer"]
    norms = []
    for x, y in data:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        norms.append(sum(p.grad.norm().item() for p in model.parameters()))
    return norms


def test_gradients_are_read_after_the_step():
    assert_same_training(sgd(), logs_gradients_after_the_step, batches(), max_compiles=1)


def test_a_gradient_read_for_the_first_time_after_many_steps():
    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        norms = []
        for step, (x, y) in enumerate(data):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            if step % 10 == 9:
                norms.append(model[0].weight.grad.norm().item())
        return norms

    assert_same_training(sgd(), loop, batches(), max_compiles=1)


def test_a_gradient_that_the_script_holds_is_not_written_over():
    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        held = []
        for step, (x, y) in enumerate(data):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            kept = [p.grad for p in model.parameters()]
            held.append([kept, [kept[0][0]], [kept[0].numpy()], [kept[0].detach()], []][step % 5])
        return [float(tensor.sum()) for tensors in held for tensor in tensors]

    assert_same_training(sgd(), loop, batches(), max_compiles=1)


def test_steps_that_use_a_gradient_again():
    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        losses = []
        for step, (x, y) in enumerate(data):
            loss = F.cross_entropy(model(x), y)
            if step % 3 != 2:
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            if step % 4 == 3:
                optimizer.step()
            losses.append(loss.item())
        return losses

    assert_same_training(sgd(), loop, batches(), may_fall_back=True)


def test_a_leaf_made_of_a_result_has_its_gradient():
    """A model in two parts, each with a backward of its own."""

    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        losses = []
        for x, y in data:
            optimizer.zero_grad()
            first = model[0](x)
            cut = first.detach().requires_grad_()
            loss = F.cross_entropy(model[1:](cut), y)
            loss.backward()
            first.backward(cut.grad)
            optimizer.step()
            losses.append(loss.item())
        return losses

    assert_same_training(sgd(), loop, batches(), may_fall_back=True)


def test_where_gradients_are_not_kept_a_look_is_an_error_with_the_cure():
    """On GPUs, and where several devices or workers train: a gradient there would be memory that is missed."""
    registry = OptimizerRegistry(keep_gradients=False)
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    registry.register(optimizer)
    registry.clears_gradients(None, [parameter], set_to_none=True)
    assert not registry.keeps_gradient(parameter)
    registry.consume([weakref.ref(parameter)])
    for use in (registry.reads_gradient, lambda parameter: registry.check_unconsumed([parameter])):
        with pytest.raises(
            GradientNotKeptError, match=r"Pass --keep-gradients to the launcher, or .*keep_gradients=True"
        ):
            use(parameter)
    assert OptimizerRegistry(keep_gradients=True).keeps_gradient(parameter)


def test_a_gradient_read_when_none_was_computed_is_none():
    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        absent = []
        for x, y in data:
            optimizer.zero_grad()
            absent.append(sum(p.grad is None for p in model.parameters()))
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        return absent

    assert_same_training(sgd(), loop, batches(), max_compiles=1)


def test_own_weight_decay_and_step():
    """A loop with an optimizer that also edits parameters by their gradients itself."""

    def make():
        model = mlp()
        return {"model": model, "optimizer": torch.optim.SGD(model[0].parameters(), lr=0.1)}

    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        losses = []
        for x, y in data:
            model.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for p in model[3].parameters():
                    p -= 0.05 * p.grad
            losses.append(loss.item())
        return losses

    assert_same_training(make, loop, batches(), max_compiles=2)


def test_gradients_are_detached_in_place():
    """As `zero_grad` of old did, and many a loop written after it: torch refuses that for a view."""

    def loop(objects, data):
        model, optimizer, losses = objects["model"], objects["optimizer"], []
        for x, y in data:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            for parameter in model.parameters():
                parameter.grad.detach_()
                parameter.grad.mul_(0.5)
            optimizer.step()
            for parameter in model.parameters():
                parameter.grad.detach_()
                parameter.grad.zero_()
            losses.append(loss.item())
        return losses

    assert_same_training(sgd(), loop, batches(), dtypes=(torch.float64,))


@pytest.mark.parametrize("of", ["optimizer", "model"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_gradients_that_are_zeroed_before_the_step_are_there(of, optimizer):
    """The step goes on with momentum and decay; one whose gradients are None would not."""

    def loop(objects, data):
        losses = []
        for index, (x, y) in enumerate(data):
            loss = F.cross_entropy(objects["model"](x), y)
            loss.backward()
            if index % 5 == 3:
                objects[of].zero_grad(set_to_none=False)
            objects["optimizer"].step()
            objects["optimizer"].zero_grad()
            losses.append(loss.item())
        return losses

    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    make = made(mlp, optimizer, lr=0.01, weight_decay=0.1, **options)
    assert_same_training(make, loop, batches(), dtypes=(torch.float64,))


def test_a_gradient_whose_elements_share_memory():
    def loop(objects, data):
        model, losses = objects["model"], []
        for x, y in data:
            objects["optimizer"].zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            model[3].bias.grad = model[3].bias.grad[:1].expand(4)
            objects["optimizer"].step()
            losses.append(loss.item())
        return losses

    assert_same_training(sgd(), loop, batches(), dtypes=(torch.float64,), may_fall_back=True)
