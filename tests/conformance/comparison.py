"""Whether what we have computed is what torch computes."""

from typing import Any, Protocol

import torch
from torch.testing._internal.common_device_type import toleranceOverride
from torch.testing._internal.opinfo.core import DecorateInfo, OpInfo

from trainingcompiler.frameworks.pytorch.interop.arrays import tensor_of

TOLERANCES = {
    torch.float16: (1e-3, 1e-5),
    torch.bfloat16: (1.6e-2, 1e-5),
    torch.float32: (1.3e-6, 1e-5),
    torch.complex64: (1.3e-6, 1e-5),
    torch.float64: (1e-7, 1e-7),
    torch.complex128: (1e-7, 1e-7),
}
"""`rtol` and `atol` of `torch.testing.assert_close`, by dtype."""

_NOISE = 3
"""How much further than torch's own result ours may be from the float64 one, as in every parity test here."""


class Compared(Protocol):
    """What is known of torch's side."""

    expected: list[torch.Tensor | None]

    def in_float64(self) -> tuple[list[torch.Tensor | None], list[float]]:
        """What torch computes of the same values in float64, and how far from that its own results are at most."""


def overridden_tolerances(operator: OpInfo, dtype: torch.dtype) -> dict[str, float] | None:
    """The widest tolerances that PyTorch's own tests of the operator on the CPU override theirs with."""
    found = []
    for decorator in operator.decorators:
        if not isinstance(decorator, DecorateInfo) or decorator.device_type not in (None, "cpu"):
            continue
        found += [
            override.d[dtype]
            for override in decorator.decorators
            if isinstance(override, toleranceOverride) and dtype in override.d
        ]
    if not found:
        return None
    return {"rtol": max(tolerance.rtol for tolerance in found), "atol": max(tolerance.atol for tolerance in found)}


def difference(compared: Compared, results: list[Any], tolerances: dict[str, float] | None) -> tuple[str, bool]:
    """Compares results with torch's.

    Two correct float32 results differ by more than `assert_close` allows where an operator sums much or is badly
    conditioned. So where they do, torch computes in float64 as well, and ours may be no further from that than three
    times what torch's float32 results are.

    Returns:
        What differs, if anything, and whether the float64 results were needed to decide.
    """
    assert len(results) == len(compared.expected), "as many results as torch has"
    far: list[int] = []
    for index, (array, theirs) in enumerate(zip(results, compared.expected, strict=True)):
        if array is None or theirs is None:
            if array is not theirs:
                return f"result {index}: torch {'has a value' if array is None else 'has none'}", False
            continue
        ours = tensor_of(array)
        if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
            return f"result {index}: {_kind(ours)} where torch gives {_kind(theirs)}", False
        if not _is_close(ours, theirs, tolerances):
            if theirs.dtype not in TOLERANCES:
                return f"result {index}: {_kind(theirs)} differs", False
            far.append(index)
    if not far:
        return "", False
    try:
        references, errors = compared.in_float64()
    except Exception:  # no float64 form: then the dtype's own tolerances decide
        references, errors = [None] * len(results), []
    for index in far:
        ours, theirs, reference = tensor_of(results[index]), compared.expected[index], references[index]
        if reference is None or not _is_as_exact(ours, theirs, reference, errors[index]):
            return f"result {index}: {_kind(theirs)} differs by {distance(ours, theirs):.1e}", True
    return "", True


def _is_close(ours: torch.Tensor, theirs: torch.Tensor, tolerances: dict[str, float] | None) -> bool:
    rtol, atol = TOLERANCES.get(theirs.dtype, (0.0, 0.0))
    if tolerances and theirs.dtype in TOLERANCES:
        rtol, atol = max(rtol, tolerances["rtol"]), max(atol, tolerances["atol"])
    return torch.allclose(ours, theirs, rtol, atol, equal_nan=True)


def _is_as_exact(ours: torch.Tensor, theirs: torch.Tensor, reference: torch.Tensor, error: float) -> bool:
    if reference.shape != theirs.shape or reference.dtype == theirs.dtype:
        return False
    finite = torch.isfinite(theirs)
    if not torch.equal(torch.isfinite(ours), finite) or not torch.allclose(
        ours[~finite], theirs[~finite], equal_nan=True
    ):
        return False
    return distance(ours, reference) <= _NOISE * error


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference of two elements that are finite."""
    wide = torch.complex128 if other.is_complex() else torch.float64
    gaps = (one.to(wide) - other.to(wide)).abs()
    return float(torch.where(torch.isfinite(gaps), gaps, 0).max()) if gaps.numel() else 0.0


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
