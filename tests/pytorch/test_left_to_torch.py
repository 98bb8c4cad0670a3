"""What PyTorch itself has to run: the numbers are eager's, and one line says what it was."""

import warnings

import pytest
import torch
from parity import assert_same_training
from small import batches, sgd
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

FLOAT64 = (torch.float64,)  # as in test_recording.py: which way was taken is asked here


def rounded(x):
    return (x * 64).round() / 64 if x.is_floating_point() else x


def hooks_on_saved_tensors(objects, x, y):
    with torch.autograd.graph.saved_tensors_hooks(rounded, lambda x: x):
        F.cross_entropy(objects["model"](x).tanh().sin(), y).backward()


def swish(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


def a_scripted_function(objects, x, y):
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        scripted = torch.jit.script(swish)
    F.cross_entropy(scripted(objects["model"](x)), y).backward()


def a_look_behind_a_retained_graph(objects, x, y):
    loss = F.cross_entropy(objects["model"](x), y)
    loss.backward(retain_graph=True)
    objects["seen"].append(objects["model"][0].weight.grad.abs().sum().item())
    (0.1 * loss).backward()


def a_transformed_function(objects, x, y):
    out = objects["model"](x)
    rows = torch.vmap(lambda row: row.pow(2).sum())(out)
    (F.cross_entropy(out, y) + 0.1 * rows.mean()).backward()


def a_jacobian(objects, x, y):
    out = objects["model"](x)
    jacobian = torch.func.jacrev(lambda out: out.softmax(-1).sum(0))(out)
    (F.cross_entropy(out, y) + 0.1 * jacobian.pow(2).mean()).backward()


class Rounding(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return (result * 64).round() / 64 if function is torch.ops.aten.addmm.default else result


def a_dispatch_mode(objects, x, y):
    with Rounding():
        F.cross_entropy(objects["model"](x), y).backward()


IN_TORCH = {
    a_transformed_function: "a function that torch.func transforms",
    a_jacobian: "a function that torch.func transforms",
    a_dispatch_mode: "a TorchDispatchMode is to see every operator",
    hooks_on_saved_tensors: "saved_tensors_hooks",
    a_scripted_function: "the scripted function",
    a_look_behind_a_retained_graph: "",
}


@pytest.mark.parametrize(("use", "reason"), IN_TORCH.items(), ids=[use.__name__ for use in IN_TORCH])
def test_what_torch_runs_is_eagers_and_said_once(use, reason):
    def loop(objects, data):
        objects["seen"] = seen = []
        for x, y in data:
            objects["optimizer"].zero_grad()
            use(objects, x, y)
            objects["optimizer"].step()
        return seen

    run = assert_same_training(sgd(), loop, batches(), may_fall_back=True, dtypes=FLOAT64)
    said = [fallback.reason for fallback in run.fallbacks()]
    assert len(said) == 1 and reason in said[0]
    assert run.fallbacks()[0].where.startswith("test_left_to_torch.py:")
