"""State seen, saved, loaded and edited while a loop trains."""

import copy
import io

import pytest
import torch
from parity import assert_same_training, train
from small import adamw, batches, made, mlp, sgd, train_on
from torch import nn
from torch.nn import functional as F

from trainingcompiler.parallel.arrays import owned_array


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

    # With gradients, the first look guesses that a backward follows, and later ones do not.
    assert_same_training(sgd(dropless), loop, batches(23), max_compiles=4)


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


def test_buffers_read_after_a_forward_that_trains_nothing():
    def loop(objects, data):
        model, seen = objects["model"], []
        for x, y in data:
            seen += train_on(model, objects["optimizer"], [(x, y)])
            seen.append(model(x + 1).sum().item())  # in train mode, with gradients on: as a careless script does
            seen.append(model.state_dict()["1.running_mean"].sum().item())
        return seen

    assert_same_training(sgd(dropless), loop, batches(), max_compiles=4)


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

    # The parameters that no optimizer has get gradients again in the step after `model.zero_grad()`: one program more.
    assert_same_training(make, loop, batches(), max_compiles=3)


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


def test_state_is_moved_once_and_never_copied_again(monkeypatch):
    copied = []
    monkeypatch.setattr(
        "trainingcompiler.frameworks.pytorch.state.shared_tensors.owned_array",
        lambda values: copied.append(values.shape) or owned_array(values),
    )
    seen = []

    def loop(objects, data):
        for batch in data:
            train_on(objects["model"], objects["optimizer"], [batch])
            seen.append(len(copied))
        return []

    train(adamw(), loop, batches(5), compiled=True)
    assert seen[1:] == [24] * 4  # 6 parameters, and of each a step count and two averages
