"""`torch.autocast("cuda")` on stand-ins, which lie on the CPU whatever the device.

Which operators autocast casts depends on the device: on a GPU a softmax and a loss are computed in float32, on a CPU a
softmax is not. torch decides it by a dispatch key that a stand-in on the CPU does not have. So, while a step of a GPU
is recorded, the kernels of the CPU's key are replaced by ones that do what those of CUDA's do (torch's
`aten/src/ATen/autocast_mode.h`, to which `tests/pytorch/test_cuda_autocast.py` holds the lists).
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

LOWER = frozenset(
    "_convolution _convolution.deprecated _scaled_dot_product_flash_attention _thnn_fused_gru_cell "
    "_thnn_fused_lstm_cell addbmm addmm addmv addr baddbmm bmm chain_matmul conv1d conv2d conv3d conv_tbc "
    "conv_transpose1d conv_transpose2d.input conv_transpose3d.input convolution cudnn_convolution "
    "cudnn_convolution_transpose einsum gru_cell linalg_multi_dot linalg_vecdot linear lstm_cell matmul mm mv prelu "
    "rnn_relu_cell rnn_tanh_cell scaled_dot_product_attention".split()
)
"""Computed in the dtype that autocast was given."""
FULL = frozenset(
    "_upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_nearest_exact1d _upsample_nearest_exact2d "
    "_upsample_nearest_exact3d acos asin binary_cross_entropy_with_logits cdist cosh cosine_embedding_loss "
    "cosine_similarity dist erfinv exp expm1 frobenius_norm.dim group_norm hinge_embedding_loss huber_loss kl_div "
    "l1_loss layer_norm log log10 log1p log2 logsumexp margin_ranking_loss mse_loss multi_margin_loss "
    "multilabel_margin_loss native_layer_norm nll_loss nll_loss2d norm.Scalar norm.ScalarOpt_dim nuclear_norm "
    "nuclear_norm.dim pdist poisson_nll_loss pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor reciprocal renorm rms_norm "
    "rsqrt sinh smooth_l1_loss soft_margin_loss softplus tan triplet_margin_loss upsample_bicubic2d "
    "upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d "
    "upsample_trilinear3d".split()
)
"""Computed in float32."""
FULL_UNLESS_ASKED = frozenset(
    "cumprod cumsum linalg_matrix_norm linalg_matrix_norm.str_ord linalg_vector_norm log_softmax.int prod prod.dim_int "
    "softmax.int sum sum.dim_IntList".split()
)
"""Computed in float32, unless `dtype=` asks for another."""
WIDEST = frozenset("addcdiv addcmul atan2 bilinear cross dot grid_sampler index_put scatter_add tensordot vdot".split())
"""Computed in the widest dtype of their arguments."""
REFUSED = frozenset(["binary_cross_entropy"])
"""An error, since float16 cannot hold its gradient."""

_installed = 0
_OVER_CPU = torch._C.DispatchKey.AutocastCPU


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Has stand-ins on the CPU follow `torch.autocast("cuda")`, whatever its state, and not `torch.autocast("cpu")`."""
    global _installed
    library = torch.library.Library("aten", "IMPL")
    enabled = torch.is_autocast_enabled("cpu")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel", UserWarning)
            for name in _known():
                library.impl(name, _kernel(name), "AutocastCPU", with_keyset=True)
        torch.set_autocast_enabled("cpu", True)  # or torch does not look at the key
        _installed += 1
        try:
            yield
        finally:
            _installed -= 1
    finally:
        torch.set_autocast_enabled("cpu", enabled)
        library._destroy()


def is_installed() -> bool:
    """Whether stand-ins follow `torch.autocast("cuda")` at this moment."""
    return _installed > 0


def is_casting() -> bool:
    """Whether autocast is on for stand-ins, be it a GPU's or a CPU's."""
    return torch.is_autocast_enabled("cuda" if is_installed() else "cpu")


@functools.cache
def _known() -> tuple[str, ...]:
    """The overloads that have a policy on the CPU or on a GPU."""
    ours = {name.removeprefix("aten::") for name in registered("AutocastCPU") | registered("AutocastCUDA")}
    return tuple(sorted(ours))


def registered(key: str) -> set[str]:
    """The overloads of `aten` for which torch has a kernel at a dispatch key."""
    return {name for name in torch._C._dispatch_get_registrations_for_dispatch_key(key) if name.startswith("aten::")}


@functools.cache
def _kernel(name: str) -> Callable:
    packet, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
    policy = _policy(name)

    def kernel(keys: torch._C.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        if policy is None or not torch.is_autocast_enabled("cuda"):
            return operator.redispatch(keys.remove(_OVER_CPU), *args, **kwargs)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(_OVER_CPU)):  # what it calls is left alone
            return policy(operator, args, kwargs)

    return kernel


def _policy(name: str) -> Callable | None:
    if name in LOWER:
        return _in_lower
    if name in FULL:
        return _in_full
    if name in FULL_UNLESS_ASKED:
        return _in_full_unless_asked
    if name in WIDEST:
        return _in_widest
    return _refuse if name in REFUSED else None


def _in_lower(operator: Any, args: tuple, kwargs: dict) -> Any:
    return _cast_to(torch.get_autocast_dtype("cuda"), operator, args, kwargs)


def _in_full(operator: Any, args: tuple, kwargs: dict) -> Any:
    return _cast_to(torch.float32, operator, args, kwargs)


def _in_full_unless_asked(operator: Any, args: tuple, kwargs: dict) -> Any:
    first = args[0]
    if kwargs.get("dtype") is None and _is_eligible(first) and not _dtype_given(operator, args):
        return operator(first.to(torch.float32), *args[1:], **kwargs)
    return operator(*args, **kwargs)


def _in_widest(operator: Any, args: tuple, kwargs: dict) -> Any:
    widest = torch.get_autocast_dtype("cuda")
    if any(_is_eligible(tensor) and tensor.dtype is torch.float32 for tensor in _tensors((args, kwargs))):
        widest = torch.float32
    return _cast_to(widest, operator, args, kwargs)


def _refuse(operator: Any, args: tuple, kwargs: dict) -> Any:
    if all(tensor.dtype is torch.float32 for tensor in _tensors(args)):
        return operator(*args, **kwargs)
    raise RuntimeError(
        "torch.nn.functional.binary_cross_entropy and torch.nn.BCELoss are unsafe to autocast: use "
        "torch.nn.functional.binary_cross_entropy_with_logits or torch.nn.BCEWithLogitsLoss"
    )


def _dtype_given(operator: Any, args: tuple) -> bool:
    names = [argument.name for argument in operator._schema.arguments]
    place = names.index("dtype") if "dtype" in names else len(args)
    return place < len(args) and args[place] is not None


def _cast_to(dtype: torch.dtype, operator: Any, args: tuple, kwargs: dict) -> Any:
    return operator(*_cast(args, dtype), **{name: _cast(value, dtype) for name, value in kwargs.items()})


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if _is_eligible(value) else value
    return type(value)(_cast(item, dtype) for item in value) if type(value) in (list, tuple) else value


def _is_eligible(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype is not torch.float64


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, list | tuple) else []
