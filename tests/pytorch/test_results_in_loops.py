"""What a loop does with results, batches and buffers between its calls: the smallest loops that once went wrong."""

import re
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from parity import assert_same_training
from small import batches, made, mlp, one_step
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F

FLOAT64 = (torch.float64,)  # as in test_recording.py: a path that is mistaken for another shows in every digit


def around_a_result(model, x, y, index):
    out = model(x)
    return F.cross_entropy(out, y) + (out - torch.normal(out.detach(), 0.5)).pow(2).mean()


def as_wide_as_a_result(model, x, y, index):
    mean, wide = model(x).chunk(2, -1)
    action = torch.distributions.Normal(mean, wide.exp()).sample()
    return -torch.distributions.Normal(mean, wide.exp()).log_prob(action).mean()


def as_wide_as_a_result_around_a_number(model, x, y, index):
    out = model(x)
    return F.cross_entropy(out, y) + (out * torch.normal(0.0, out.detach().exp())).mean()


def minus_zero(model, x, y, index):
    out = model(x)
    return F.cross_entropy(out, y) + (1 / (out.detach().abs().sum() * (0.0 if index % 2 else -0.0))).clamp(-1, 1)


# `Normal` checks the values that it is given, which takes programs of their own.
@pytest.mark.parametrize(
    ("loss_of", "max_compiles"),
    {around_a_result: 1, as_wide_as_a_result: 6, as_wide_as_a_result_around_a_number: 1, minus_zero: 2}.items(),
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_trains_what_eager_trains(loss_of, max_compiles):
    make = made(mlp, torch.optim.SGD, lr=0.1)
    assert_same_training(make, one_step(loss_of), batches(), dtypes=FLOAT64, max_compiles=max_compiles)


def test_a_leaf_made_by_assigning_requires_grad_has_a_gradient():
    def loop(objects, data):
        model, optimizer, losses = objects["model"], objects["optimizer"], []
        for x, y in data:
            optimizer.zero_grad()
            hidden = model["encoder"](x)
            leaf = hidden.detach()
            leaf.requires_grad = True
            loss = F.cross_entropy(model["head"](leaf), y)
            loss.backward()
            hidden.backward(leaf.grad)
            optimizer.step()
            losses.append(loss.item())
        return losses

    make = made(lambda: nn.ModuleDict({"encoder": nn.Linear(8, 6), "head": nn.Linear(6, 4)}), torch.optim.SGD, lr=0.1)
    assert_same_training(make, loop, batches(), dtypes=FLOAT64, may_fall_back=True)


def test_a_leaf_that_nobody_holds_any_more_is_part_of_the_program():
    """Wav2Vec2 makes its input one, for gradient checkpointing."""

    def net():
        class Assigning(nn.Sequential):
            def forward(self, x):
                hidden = x[:, None]
                hidden.requires_grad = True
                return super().forward(hidden)[:, 0]

        return Assigning(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))

    def of_model(model, x, y, index):
        return F.cross_entropy(model(x), y)

    assert_same_training(made(net, torch.optim.SGD, lr=0.1), one_step(of_model), batches(), dtypes=FLOAT64)


@pytest.mark.parametrize("new", [torch.clone, torch.zeros_like])
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_a_buffer_of_batch_norm_is_replaced(name, new):
    def loop(objects, data):
        losses = []
        for index, (x, y) in enumerate(data):
            objects["optimizer"].zero_grad()
            loss = F.cross_entropy(objects["model"](x), y)
            loss.backward()
            objects["optimizer"].step()
            losses.append(loss.item())
            if index % 5 == 2:
                setattr(objects["model"][1], name, new(getattr(objects["model"][1], name)))
        return losses

    net = made(lambda: nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)), torch.optim.SGD, lr=0.1)
    assert_same_training(net, loop, batches(), dtypes=FLOAT64)


def test_gradients_that_several_results_are_given_are_constants():
    def loop(objects, data):
        model, seen = objects["model"], []
        for x, _ in data:
            objects["optimizer"].zero_grad()
            out, hidden = model(x), model[0](x)
            with pytest.raises(RuntimeError, match="Mismatch in shape"):
                torch.autograd.backward([out, hidden], [out[:1], hidden])
            torch.autograd.backward([out, hidden], [0.1 * out, 0.1 * hidden])
            objects["optimizer"].step()
            seen.append(out.sum().item())
        return seen

    assert_same_training(made(mlp, torch.optim.SGD, lr=0.1), loop, batches(), dtypes=FLOAT64, may_fall_back=True)


def halves_the_batch(x, queue, out):
    x.mul_(0.5)


def fills_the_queue(x, queue, out):
    queue[:16] = out.detach()


@pytest.mark.parametrize("write", [halves_the_batch, fills_the_queue])
def test_what_a_gradient_needs_and_was_written_to_raises_at_backward(write):
    """As torch's own check says; the script may catch it, and goes on."""

    def loop(objects, data):
        model, optimizer, losses, raised = objects["model"], objects["optimizer"], [], []
        queue = torch.linspace(-1.0, 1.0, 32 * 4, dtype=torch.float64).reshape(32, 4)
        for index, (x, y) in enumerate(data):
            x = x.clone()
            optimizer.zero_grad()
            out = model(x)
            loss = F.cross_entropy(out @ queue.T, y)
            if index % 3 == 2:
                write(x, queue, out)
            try:
                loss.backward()
            except RuntimeError as error:
                assert "modified by an inplace operation" in str(error)
                raised.append(index)
                continue
            optimizer.step()
            losses.append(loss.item())
        return [*losses, *raised]

    assert_same_training(made(mlp, torch.optim.SGD, lr=0.1), loop, batches(), dtypes=FLOAT64, may_fall_back=True)


def test_what_no_gradient_needs_may_be_written_to():
    def loss_of(model, x, y, index):
        x = x.clone()
        loss = F.cross_entropy(model(x + 1), y)
        x.zero_()
        return loss

    assert_same_training(
        made(mlp, torch.optim.SGD, lr=0.1), one_step(loss_of), batches(), dtypes=FLOAT64, max_compiles=2
    )


SHAMPOO = """
import torch
from torch import nn
torch.manual_seed(0)
model = nn.Linear(4, 3)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
for _ in range(4):
    optimizer.zero_grad()
    out = model(torch.randn(8, 4))
    loss = torch.linalg.eigvalsh(out.t() @ out).sum()
    loss.backward()
    optimizer.step()
print(loss.item())
"""


def test_a_kept_program_that_calls_lapack_runs_at_a_second_start(tmp_path):
    """Its functions were found when a program was lowered, which a kept one is not: the process ended with a signal."""
    script = tmp_path / "train.py"
    script.write_text(SHAMPOO)
    command = [sys.executable, "-m", "trainingcompiler.launch", "--engine=xla", f"--cache-dir={tmp_path}", str(script)]
    first, second = (subprocess.run(command, capture_output=True, text=True, check=False) for _ in range(2))
    assert (first.returncode, second.returncode) == (0, 0), second.stderr
    assert "from the cache" in second.stderr and "from the cache" not in first.stderr
    assert first.stdout == second.stdout


def by_its_class(model, x, y, index):
    out = model(x)
    return F.cross_entropy(out, y) * (2.0 if type(out) == torch.Tensor else 1.0)  # noqa: E721


def test_a_script_chooses_by_the_class_of_a_result():
    make = made(mlp, torch.optim.SGD, lr=0.1)
    assert_same_training(make, one_step(by_its_class), batches(), dtypes=FLOAT64, max_compiles=1)


class Doubling(torch.Tensor):
    """A batch whose linear layers give twice as much, and whose results are of its class."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        return result * 2 if func is F.linear else result


class Unwrapped(torch.Tensor):
    """A batch whose results are plain tensors, as torchvision's."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if not all(issubclass(cls, kind) for kind in types):
            return NotImplemented
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        return result.as_subclass(torch.Tensor) if isinstance(result, cls) else result


@pytest.mark.parametrize(("kind", "falls_back"), [(Doubling, True), (Unwrapped, False)])
def test_a_batch_of_a_class_of_its_own(kind, falls_back):
    def loss_of(model, x, y, index):
        out = model(x.as_subclass(kind))
        assert isinstance(out, Doubling) == falls_back
        return F.cross_entropy(out, y)

    make = made(mlp, torch.optim.SGD, lr=0.1)
    run = assert_same_training(make, one_step(loss_of), batches(), dtypes=FLOAT64, may_fall_back=falls_back)
    assert len(run.fallbacks()) == falls_back


def test_a_leaf_made_of_a_parameter_is_trained_by_a_new_optimizer():
    def loop(objects, data):
        model, losses = objects["model"], []
        scale = nn.Parameter(torch.ones(4, dtype=torch.float64))
        optimizer = torch.optim.SGD([*model.parameters(), scale], lr=0.1)
        for index, (x, y) in enumerate(data):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x) * scale, y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if index % 4 == 3:
                scale = (scale * 0.9).detach().requires_grad_(True)
                optimizer = torch.optim.SGD([*model.parameters(), scale], lr=0.1)
        return [*losses, *scale.tolist()]

    assert_same_training(made(mlp, torch.optim.SGD, lr=0.1), loop, batches(12), dtypes=FLOAT64)


@pytest.mark.parametrize("trace", [torch.jit.trace, torch.jit.trace_module], ids=lambda trace: trace.__name__)
def test_a_model_is_traced_in_mid_run(trace):
    def loop(objects, data):
        model, optimizer, seen = objects["model"], objects["optimizer"], []
        for index, (x, y) in enumerate(data):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            if index == 5:
                with warnings.catch_warnings():  # torch says that tracing is on its way out
                    warnings.simplefilter("ignore")
                    traced = trace(model, {"forward": x} if trace.__name__ == "trace_module" else x)
                seen.append(traced(x).sum().item())
            loss.backward()
            optimizer.step()
        return seen

    assert_same_training(made(mlp, torch.optim.SGD, lr=0.1), loop, batches(12), dtypes=FLOAT64, may_fall_back=True)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # of torch's own use
def test_forward_mode_gradients_beside_training():
    def loop(objects, data):
        model, optimizer, seen = objects["model"], objects["optimizer"], []
        for index, (x, y) in enumerate(data):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            if index % 4 == 3:
                with forward_ad.dual_level():
                    out = model(forward_ad.make_dual(x, torch.ones_like(x)))
                    seen.append(forward_ad.unpack_dual(out).tangent.sum().item())
        return seen

    assert_same_training(made(mlp, torch.optim.SGD, lr=0.1), loop, batches(12), dtypes=FLOAT64, may_fall_back=True)


REFUSED = {
    "no scalar": (lambda out: out.backward(), "grad can be implicitly created only for scalar outputs"),
    "another shape": (lambda out: out.backward(out[:1].detach()), "Mismatch in shape: grad_output[0] has a shape of"),
    "no history": (lambda out: out.detach().sum().backward(), "element 0 of tensors does not require grad"),
    "numpy": (lambda out: out.numpy(), "Can't call numpy() on Tensor that requires grad"),
    "a flag": (lambda out: out.requires_grad_(False), "you can only change requires_grad flags of leaf variables"),
}


@pytest.mark.parametrize(("ask", "says"), REFUSED.values(), ids=REFUSED)
def test_what_torch_refuses_of_a_result_is_refused_at_once(ask, says):
    def loss_of(model, x, y, index):
        out = model(x)
        with pytest.raises(RuntimeError, match=re.escape(says)):
            ask(out)
        with pytest.raises(AttributeError, match="'Tensor' object has no attribute 'no_such'"):
            _ = out.no_such
        return F.cross_entropy(out, y)

    make = made(mlp, torch.optim.SGD, lr=0.1)
    assert_same_training(make, one_step(loss_of), batches(), dtypes=FLOAT64, max_compiles=2)


def test_a_hook_that_differentiates_another_result():
    """The implicit gradient of a layer that is a fixed point. torch runs the hook, outside of any mode of ours."""

    def loss_of(model, x, y, index):
        hidden = torch.tanh(model[0](x))
        point = hidden.detach().requires_grad_()
        again = torch.tanh(point @ model[0].weight[:, :4] @ torch.ones(4, 6, dtype=x.dtype)) + point
        hidden.register_hook(
            lambda gradient: torch.autograd.grad(again, point, gradient, retain_graph=True)[0] + gradient
        )
        return F.cross_entropy(model[1](hidden), y)

    make = made(lambda: nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)), torch.optim.SGD, lr=0.1)
    assert_same_training(make, one_step(loss_of), batches(), dtypes=FLOAT64, may_fall_back=True)


def a_shifted_sequence(model, x, y, index):
    shifted = model(x).view(4, 4, 4)[:, :-1].contiguous().view(-1, 4)
    return F.cross_entropy(shifted, y.view(4, 4)[:, 1:].reshape(-1))


def a_copy_of_a_part_that_is_written_to(model, x, y, index):
    out = model(x)
    part = out[:, :2].contiguous()
    part.mul_(2)
    return out.pow(2).mean() + part.mean()


def the_strides_of_a_part(model, x, y, index):
    out = model(x)
    part = out[:, 1:3]
    assert part.stride() == (4, 1) and not part.is_contiguous()
    return part.pow(2).mean() + F.cross_entropy(out, y)


def parts_of_an_expanded_result(model, x, y, index):
    wide = model(x).expand(3, 16, 4)
    return F.cross_entropy(wide.unbind(0)[1].contiguous().view(-1, 4), y) + wide.contiguous().view(-1).pow(2).mean()


@pytest.mark.parametrize(
    "loss_of",
    [a_shifted_sequence, a_copy_of_a_part_that_is_written_to, the_strides_of_a_part, parts_of_an_expanded_result],
)
def test_a_part_of_a_result_whose_elements_do_not_lie_side_by_side(loss_of):
    assert_same_training(made(mlp, torch.optim.SGD, lr=0.1), one_step(loss_of), batches(), dtypes=FLOAT64)


def a_batch_that_does_not_lie_side_by_side(model, x, y, index):
    turned = x.t().contiguous().t() * model[0].weight.sum()
    copy = turned.contiguous()
    copy.mul_(2)
    return F.cross_entropy(model(turned), y) + copy.mean() * float(turned.is_contiguous() + 1)


def test_what_is_computed_from_a_batch_lies_as_the_batch_does():
    make, loop = made(mlp, torch.optim.SGD, lr=0.01), one_step(a_batch_that_does_not_lie_side_by_side)
    assert_same_training(make, loop, batches(), dtypes=FLOAT64, max_compiles=1)


def test_a_result_lies_as_before_when_it_has_been_computed():
    def loop(objects, data):
        found = []
        for x, y in data:
            objects["optimizer"].zero_grad()
            out = objects["model"](x)
            turned = out.t()
            F.cross_entropy(out, y).backward()
            objects["optimizer"].step()
            found += [*turned.stride(), turned.sum().item()]
        return found

    assert_same_training(made(mlp, torch.optim.SGD, lr=0.1), loop, batches(), dtypes=FLOAT64)


IN_PLACE = {
    "unsqueeze_": lambda h: h.unsqueeze_(0),
    "squeeze_": lambda h: h.unsqueeze(0).squeeze_(0),
    "squeeze_ nothing": lambda h: h.squeeze_(),
    "t_": lambda h: h.t_(),
    "transpose_": lambda h: h.transpose_(0, 1),
    "swapdims_": lambda h: h.swapdims_(0, 1),
    "detach_": lambda h: h.detach_(),
    "set_": lambda h: h.detach_().set_(torch.ones(16, 4)),
    "resize_": lambda h: h.detach_().resize_(4, 16),
    "apply_": lambda h: h.detach_().apply_(lambda value: value * 2),
}


@pytest.mark.parametrize("change", IN_PLACE.values(), ids=IN_PLACE)
@pytest.mark.parametrize("of", ["a result", "a batch"])
def test_a_shape_that_is_changed_in_place(change, of):
    def loop(objects, data):
        model, found = objects["model"], []
        for x, y in data:
            objects["optimizer"].zero_grad()
            out = model(x)
            changed = out * 1 if of == "a result" else x[:, :4].clone()
            assert change(changed) is changed or change is IN_PLACE["squeeze_"]
            found += [*changed.shape, float(changed.requires_grad)]
            loss = F.cross_entropy(out, y) + (changed * changed).mean()
            loss.backward()
            objects["optimizer"].step()
            found.append(loss.item())
        return found

    may = {"may_fall_back": change in (IN_PLACE["set_"], IN_PLACE["resize_"], IN_PLACE["apply_"])}
    assert_same_training(made(mlp, torch.optim.SGD, lr=0.1), loop, batches(), dtypes=FLOAT64, **may)


def test_attributes_that_a_script_sets_on_results_stay():
    def loop(objects, data):
        found = []
        for x, y in data:
            objects["optimizer"].zero_grad()
            out = objects["model"](x)
            out.tag = 3.0
            out.unsqueeze_(0)
            loss = F.cross_entropy(out[0], y)
            loss.tag = 5.0
            loss.backward()
            seen = out.detach()
            seen.tag = 7.0
            objects["optimizer"].step()
            found += [loss.item(), out.tag, loss.tag, seen.sum().item(), seen.tag]
        return found

    assert_same_training(made(mlp, torch.optim.SGD, lr=0.1), loop, batches(), dtypes=FLOAT64)


class ChangesItsInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x):
        before = x * 2
        x.unsqueeze_(0)
        return self.layer(x).squeeze(0) + before[:, :4]


def test_a_batch_whose_shape_a_forward_changes_in_place():
    make, loop = made(ChangesItsInput, torch.optim.SGD, lr=0.1), one_step(lambda m, x, y, i: F.cross_entropy(m(x), y))
    assert_same_training(make, loop, batches(), dtypes=FLOAT64, max_compiles=1)


def test_a_backward_that_a_script_puts_in_the_place_of_torchs():
    torchs = torch.Tensor.backward

    def doubled(tensor, *args, **kwargs):
        torchs(tensor * 2, *args, **kwargs)

    def loop(objects, data):
        losses = []
        for x, y in data:
            torch.Tensor.backward = doubled
            objects["optimizer"].zero_grad()
            loss = F.cross_entropy(objects["model"](x), y)
            loss.backward()
            objects["optimizer"].step()
            torch.Tensor.backward = torchs
            losses.append(loss.item())
        return losses

    assert_same_training(made(mlp, torch.optim.SGD, lr=0.1), loop, batches(), dtypes=FLOAT64)


def test_a_backward_in_another_thread():
    def loop(objects, data):
        losses = []
        for x, y in data:
            objects["optimizer"].zero_grad()
            loss = F.cross_entropy(objects["model"](x), y)
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()
            objects["optimizer"].step()
            losses.append(loss.item())
        return losses

    make = made(mlp, torch.optim.SGD, lr=0.1)
    run = assert_same_training(make, loop, batches(), dtypes=FLOAT64, may_fall_back=True)
    assert "differentiates a result of the thread that trains" in run.fallbacks()[0].reason


def under_no_grad(hidden):
    with torch.no_grad():
        hidden.mul_(2)


def detached(hidden):
    hidden.detach().mul_(2)


def plainly(hidden):
    hidden.mul_(2)


@pytest.mark.parametrize("writes", [under_no_grad, detached, plainly])
def test_an_activation_that_a_gradient_needs_and_is_edited_is_refused_by_backward(writes):
    def loop(objects, data):
        model, found = objects["model"], []
        for index, (x, y) in enumerate(data):
            objects["optimizer"].zero_grad()
            hidden = model[1](model[0](x))
            loss = F.cross_entropy(model[3](model[2](hidden)), y)
            if index % 4 == 3:
                writes(hidden)
            try:
                loss.backward()
            except RuntimeError as error:
                assert "modified by an inplace operation" in str(error)
                found.append(-1.0)
                continue
            objects["optimizer"].step()
            found.append(loss.item())
        return found

    assert_same_training(made(mlp, torch.optim.SGD, lr=0.1), loop, batches(), dtypes=FLOAT64, may_fall_back=True)


def test_a_choice_drawn_by_probabilities_is_eagers():
    def drawn(model, x, y, index):
        chosen = F.gumbel_softmax(model(x), hard=index % 2 == 0)
        return -(chosen * F.one_hot(y, 4)).sum() + chosen.pow(2).sum()

    assert_same_training(
        made(mlp, torch.optim.SGD, lr=0.01), one_step(drawn), batches(), dtypes=FLOAT64, max_compiles=2
    )


def test_what_an_agent_has_asked_its_model_for_is_no_part_of_the_next_step():
    """`x.cpu()` of what is on the CPU already computes nothing: it must not keep a forward on the tape."""

    def loop(objects, data):
        model, optimizer, seen = objects["model"], objects["optimizer"], []
        for index, (x, y) in enumerate(data):
            for row in x[: index % 7]:  # outside of `no_grad`, as many agents act
                action = model(row[None]).argmax(1).cpu().numpy()
                seen.append(float(action[0]))
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x).to(x.dtype), y)
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
        return seen

    run = assert_same_training(made(mlp, torch.optim.SGD, lr=0.1), loop, batches(), dtypes=FLOAT64)
    assert run.statistics.compiles <= 6, run.statistics
