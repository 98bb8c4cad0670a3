"""Entries of the database that no compiled training step can contain, or whose results cannot be compared, and why."""

import re
from typing import NamedTuple

import torch

_SHAPE = "the shape of the result depends on values"
_NUMBER = "the result is a Python value, which ends a compiled step"
_SPARSE = "sparse tensors"
_COMPLEX = "complex tensors only"
_UNDEFINED = "the result is uninitialised memory"
_DEVICE = "no CPU kernel"
_RESIZES = "resizes its argument in place"
_QUANTIZED = "8-bit and quantized floats only"

_EXCLUDED = {
    "masked_select|nonzero|argwhere|unique|unique_consecutive|bincount": _SHAPE,
    "item|allclose|equal|broadcast_shapes": _NUMBER,
    "to_sparse|sparse\\..*": _SPARSE,
    "view_as_real|imag|istft|nn.functional.silu:complex": _COMPLEX,
    "empty|empty_like|new_empty|new_empty_strided|empty_strided|empty_permuted": _UNDEFINED,
    "jiterator_.*|.*_flash_attention_forward|.*_efficient_attention_forward": _DEVICE,
    "nn.functional.batch_norm:without_cudnn": _DEVICE,
    "chalf": "complex numbers of 16-bit floats, which XLA has not",
    "resize_|resize_as_": _RESIZES,
    "torch._scaled_mm.*": _QUANTIZED,
}

GAUGED = frozenset(
    "linalg.eigh linalg.eig svd linalg.svd svd_lowrank pca_lowrank linalg.lstsq linalg.lstsq:grad_oriented".split()
)
"""Entries whose results are unique only up to a sign, a phase or an order: compared after the function by which
PyTorch's own tests of gradients remove that freedom."""


class Tie(NamedTuple):
    """Where `dim` stands among an entry's arguments, what it is by default, and whether the last result is indices."""

    dim_position: int = 0
    dim_default: int = -1
    has_indices: bool = True


TIED = {
    "kthvalue": Tie(1),
    "topk": Tie(1),
    "mode": Tie(),
    "sort": Tie(),
    "argsort": Tie(),
    "msort": Tie(dim_default=0, has_indices=False),
}
"""Entries that may choose any of several equal values, so that these are compared in place of their indices, and of
gradients what does not depend on the choice."""


def exclusion(name: str, dtype: torch.dtype) -> str:
    """Why an entry is not tested; empty where it is."""
    for pattern, reason in _EXCLUDED.items():
        if re.fullmatch(pattern, name):
            return reason
    return ""
