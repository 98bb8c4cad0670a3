"""`torch.autocast("cuda")` on stand-ins on the CPU: torch's own lists, and what they make of dtypes."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from trainingcompiler.frameworks.pytorch.interop import cuda_autocast

LISTS = (
    cuda_autocast.LOWER,
    cuda_autocast.FULL,
    cuda_autocast.FULL_UNLESS_ASKED,
    cuda_autocast.WIDEST,
    cuda_autocast.REFUSED,
)


@pytest.fixture
def autocast():
    """Turns CUDA's autocast on for stand-ins; torch's context manager refuses to without a GPU."""
    with cuda_autocast.installed(), FakeTensorMode():
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        yield
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", torch.float16)


def test_every_operator_that_torch_casts_on_a_gpu_is_in_one_list():
    ours = [name for names in LISTS for name in names]
    assert len(ours) == len(set(ours))
    assert {f"aten::{name}" for name in ours} == cuda_autocast.registered("AutocastCUDA")


FULL, HALF = torch.float32, torch.bfloat16
EXPECTED = {
    "linear": (lambda x, h: F.linear(x, x), HALF),
    "matmul": (lambda x, h: x @ x.T, HALF),
    "einsum": (lambda x, h: torch.einsum("ij,kj->ik", x, h), HALF),
    "convolution": (lambda x, h: F.conv1d(x[None], x[None]), HALF),
    "softmax": (lambda x, h: h.softmax(-1), FULL),
    "softmax that is asked for a dtype": (lambda x, h: h.softmax(-1, dtype=torch.float64), torch.float64),
    "cross entropy": (lambda x, h: F.cross_entropy(h, torch.zeros(4, dtype=torch.int64)), FULL),
    "layer norm": (lambda x, h: F.layer_norm(h, (4,)), FULL),
    "sum": (lambda x, h: h.sum(), FULL),
    "norm": (lambda x, h: torch.linalg.vector_norm(h), FULL),
    "power": (lambda x, h: h**2, FULL),
    "addcmul of both": (lambda x, h: torch.addcmul(h, h, x), FULL),
    "addcmul of halves": (lambda x, h: torch.addcmul(h, h, h), HALF),
    "addition": (lambda x, h: h + h, HALF),
    "relu": (lambda x, h: F.relu(h), HALF),
    "stack, which a CPU casts": (lambda x, h: torch.stack([h, x]), FULL),
    "pooling, which a CPU casts": (lambda x, h: F.avg_pool3d(h.view(1, 1, 1, 4, 4), 1), HALF),
    "float64": (lambda x, h: F.linear(x.double(), x.double()), torch.float64),
    "integers": (lambda x, h: x.long().sum(), torch.int64),
}


@pytest.mark.parametrize("case", EXPECTED)
def test_dtypes(autocast, case):
    function, dtype = EXPECTED[case]
    x = torch.zeros(4, 4)
    assert function(x, x.to(HALF)).dtype is dtype


def test_gradients_have_the_dtype_of_the_parameters(autocast):
    weight = torch.zeros(4, 4, requires_grad=True)
    F.cross_entropy(F.linear(torch.zeros(4, 4), weight), torch.zeros(4, dtype=torch.int64)).backward()
    assert weight.grad.dtype is FULL


def test_what_is_turned_off_inside_is_off(autocast):
    with torch.autocast("cuda", enabled=False):
        assert (torch.zeros(4, 4) @ torch.zeros(4, 4)).dtype is FULL
    assert (torch.zeros(4, 4) @ torch.zeros(4, 4)).dtype is HALF


def test_what_is_unsafe_is_refused_as_in_torch(autocast):
    with pytest.raises(RuntimeError, match="unsafe to autocast"):
        F.binary_cross_entropy(torch.zeros(4, dtype=HALF), torch.zeros(4, dtype=HALF))


def test_afterwards_a_cpu_casts_as_before():
    with cuda_autocast.installed():
        pass
    assert not torch.is_autocast_enabled("cpu")
    with torch.autocast("cpu", dtype=HALF):
        assert torch.zeros(4, 4, dtype=HALF).softmax(-1).dtype is HALF
        assert F.linear(torch.zeros(4, 4), torch.zeros(4, 4)).dtype is HALF
