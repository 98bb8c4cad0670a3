"""State seen, saved, loaded and edited while a loop trains."""

import copy
import io

import pytest
import torch
from parity import assert_same_training
from small import adamw, batches, made, mlp, sgd, train_on
from torch import nn
from torch.nn import functional as F


def dropless():
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))


def accuracy(model, data):
    model.eval()
    correct, loss = 0, 0.0
    with torch.no_grad():
        for x, y in data:
            outputs = model(x)
            loss += F.cross_entropy(outputs, y).item()
            correct += (outputs.argmax(1) == y).sum().item()
    model.train()
    return [loss, correct]


def test_evaluation_in_between():
    def loop(objects, data):
        seen = []
        for epoch in range(4):
            seen += train_on(objects["model"], objects["optimizer"], data[epoch * 6 : epoch * 6 + 6])
            seen += accuracy(objects["model"], data[24:])
        return seen

    assert_same_training(sgd(dropless), loop, batches(28), max_compiles=2)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_evaluation_in_every_mode(mode):
    def loop(objects, data):
        model, seen = objects["model"], []
        for x, y in data[:22]:
            seen += train_on(model, objects["optimizer"], [(x, y)])
            with mode():
                seen.append(model(data[22][0]).sum().item())  # in train mode: BatchNorm learns from it
        return seen

    assert_same_training(sgd(dropless), loop, batches(23), max_compiles=3)


def test_unread_forward_still_updates_buffers():
    def loop(objects, data):
        model = objects["model"]
        losses = train_on(model, objects["optimizer"], data)
        with torch.no_grad():
            for x, _ in data[:5]:
                model(x)
        return losses

    run = assert_same_training(sgd(dropless), loop, batches(), max_compiles=2)
    assert run.objects["model"][1].num_batches_tracked.item() == 29


def test_state_dict_is_current_and_stays_what_it_was_when_copied():
    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        live, seen, kept = model.state_dict(), [], []
        for x, y in data:
            train_on(model, optimizer, [(x, y)])
            seen.append(sum(value.sum().item() for value in live.values()))
            kept.append(copy.deepcopy(model.state_dict()))
            kept.append({name: value.detach().clone() for name, value in model.state_dict().items()})
            moments = optimizer.state_dict()["state"]
            seen.append(sum(v.sum().item() for s in moments.values() for v in s.values() if torch.is_tensor(v)))
        assert all(type(value) is torch.Tensor for value in kept[0].values())
        return [*seen, *(sum(value.double().sum().item() for value in state.values()) for state in kept)]

    assert_same_training(sgd(dropless), loop, batches(), max_compiles=1)


def test_best_weights_restored():
    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        best, best_loss, seen = None, float("inf"), []
        for start in range(0, 24, 4):
            loss = sum(train_on(model, optimizer, data[start : start + 4]))
            seen.append(loss)
            if loss < best_loss:
                best, best_loss = copy.deepcopy(model.state_dict()), loss
            if start == 12:
                model.load_state_dict(best)
        model.load_state_dict(best)
        return [*seen, *train_on(model, optimizer, data[:4])]

    assert_same_training(adamw(dropless), loop, batches(), max_compiles=1)


def test_both_state_dicts_loaded_in_mid_run():
    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        seen = train_on(model, optimizer, data[:8])
        saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        seen += train_on(model, optimizer, data[8:16])
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        return seen + train_on(model, optimizer, data[8:])

    for make in (sgd(), adamw()):
        assert_same_training(make, loop, batches(), max_compiles=2)


@pytest.mark.parametrize("make", [sgd(dropless), adamw(dropless)], ids=["sgd", "adamw"])
def test_resumption_from_a_file(make, tmp_path):
    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
        seen = train_on(model, optimizer, data[:12])
        scheduler.step()
        parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        torch.save({name: part.state_dict() for name, part in parts.items()}, tmp_path / "checkpoint.pt")
        del model, optimizer, scheduler, parts

        objects.update(make())
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(objects["optimizer"], 30)
        checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        objects["model"].load_state_dict(checkpoint["model"])
        objects["optimizer"].load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"])
        return seen + train_on(objects["model"], objects["optimizer"], data[12:])

    assert_same_training(make, loop, batches(), max_compiles=2)


def test_whole_model_saved_and_loaded():
    def loop(objects, data):
        seen = train_on(objects["model"], objects["optimizer"], data[:12])
        file = io.BytesIO()
        torch.save(objects["model"], file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        assert all(type(p) is nn.Parameter for p in loaded.parameters())
        seen += accuracy(loaded, data)
        return seen + train_on(objects["model"], objects["optimizer"], data[12:])

    assert_same_training(adamw(), loop, batches(), max_compiles=2)


def test_deep_copies_are_independent():
    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        seen = train_on(model, optimizer, data[:10])
        teacher = objects["teacher"] = copy.deepcopy(model)
        seen += train_on(model, optimizer, data[10:])
        assert all(type(p) is nn.Parameter and p.is_leaf for p in teacher.parameters())
        second = torch.optim.SGD(teacher.parameters(), lr=0.1, momentum=0.9)
        return seen + accuracy(teacher, data) + train_on(teacher, second, data)

    assert_same_training(sgd(), loop, batches(), max_compiles=3)


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


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("every", [1, 5])
def test_parameters_edited_between_steps(edit, every):
    def loop(objects, data):
        extra, seen = {}, []
        for step, (x, y) in enumerate(data):
            seen += train_on(objects["model"], objects["optimizer"], [(x, y)])
            if step % every == every - 1:
                edit(objects["model"], extra)
        if "average" in extra:
            objects["average"] = extra["average"]
        return seen

    assert_same_training(sgd(), loop, batches(), max_compiles=3)


def test_buffers_and_optimizer_state_edited_between_steps():
    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        seen = []
        for x, y in data:
            seen += train_on(model, optimizer, [(x, y)])
            model[1].running_mean.zero_()
            model[1].reset_running_stats() if len(seen) == 7 else None
            for state in optimizer.state.values():
                state["momentum_buffer"].mul_(0.5)
        return seen

    assert_same_training(sgd(dropless), loop, batches(), max_compiles=1)


def test_optimizer_state_cleared_in_mid_run():
    def loop(objects, data):
        seen = train_on(objects["model"], objects["optimizer"], data[:10])
        objects["optimizer"].state.clear()
        return seen + train_on(objects["model"], objects["optimizer"], data[10:])

    assert_same_training(adamw(), loop, batches(), max_compiles=2)


def test_parameter_group_added_in_mid_run():
    def make():
        model = mlp()
        return {"model": model, "optimizer": torch.optim.AdamW(model[3].parameters(), lr=0.01)}

    def loop(objects, data):
        seen = train_on(objects["model"], objects["optimizer"], data[:10])
        objects["model"].zero_grad()
        objects["optimizer"].add_param_group({"params": objects["model"][0].parameters(), "lr": 0.001})
        return seen + train_on(objects["model"], objects["optimizer"], data[10:])

    assert_same_training(make, loop, batches(), max_compiles=2)


def test_a_new_optimizer_in_mid_run():
    def loop(objects, data):
        seen = train_on(objects["model"], objects["optimizer"], data[:10])
        objects["optimizer"] = torch.optim.AdamW(objects["model"].parameters(), lr=0.01)
        return seen + train_on(objects["model"], objects["optimizer"], data[10:])

    assert_same_training(sgd(), loop, batches(), max_compiles=2)


def test_a_layer_replaced_in_mid_run():
    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        seen = train_on(model, optimizer, data[:10])
        model[3] = nn.Linear(32, 4)
        optimizer.add_param_group({"params": model[3].parameters()})
        return seen + train_on(model, optimizer, data[10:])

    assert_same_training(sgd(), loop, batches(), max_compiles=2)


def test_a_model_converted_in_mid_run():
    def loop(objects, data):
        seen = train_on(objects["model"], objects["optimizer"], data[:10])
        objects["model"].to(torch.device("cpu"))
        with torch.no_grad():
            for p in objects["model"].parameters():
                assert p.is_contiguous() and p.grad_fn is None
        return seen + train_on(objects["model"], objects["optimizer"], data[10:])

    assert_same_training(made(mlp, torch.optim.RMSprop, lr=0.01), loop, batches(), max_compiles=1)
