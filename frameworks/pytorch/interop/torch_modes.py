"""torch's modes: what kernels read of the process and not of their arguments."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch

from trainingcompiler.frameworks.pytorch.interop import cuda_autocast


class TorchModes(NamedTuple):
    """torch's modes around a call, which decide what the call computes.

    The dtypes of autocast are None where nothing is cast.
    """

    grad: bool
    autocast: bool
    autocast_dtype: torch.dtype | None
    cuda_autocast: bool
    cuda_autocast_dtype: torch.dtype | None
    default_dtype: torch.dtype
    precision: str
    deterministic: bool

    @classmethod
    def now(cls) -> "TorchModes":
        """The modes that are set at this moment in this thread."""
        grad = torch.is_grad_enabled()
        rest = (
            torch.get_default_dtype(),
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
        )
        if torch._C._is_any_autocast_enabled():
            return cls(
                grad,
                torch.is_autocast_enabled("cpu"),
                torch.get_autocast_dtype("cpu"),
                torch.is_autocast_enabled("cuda"),
                torch.get_autocast_dtype("cuda"),
                *rest,
            )
        known = _plain.get((grad, rest))  # asked at every call that is recorded
        if known is None:
            known = _plain[grad, rest] = cls(grad, False, None, False, None, *rest)
        return known

    def around(self) -> contextlib.AbstractContextManager:
        """Sets the modes for a replay."""
        now = TorchModes.now()
        if cuda_autocast.is_installed() or now[1:] != self[1:]:
            return self._entered()
        return contextlib.nullcontext() if now.grad == self.grad else torch.set_grad_enabled(self.grad)

    @contextlib.contextmanager
    def _entered(self) -> Iterator[None]:
        outside = TorchModes.now()
        cuda_dtype = torch.get_autocast_dtype("cuda")
        warns = torch.is_deterministic_algorithms_warn_only_enabled()
        try:
            self._set(warns)
            with (
                torch.set_grad_enabled(self.grad),
                torch.autocast("cpu", dtype=self.autocast_dtype, enabled=self.autocast or cuda_autocast.is_installed()),
            ):
                yield
        finally:
            outside._set(warns)
            torch.set_autocast_dtype("cuda", cuda_dtype)

    def _set(self, warns: bool) -> None:
        torch.set_autocast_enabled("cuda", self.cuda_autocast)
        if self.cuda_autocast_dtype is not None:
            torch.set_autocast_dtype("cuda", self.cuda_autocast_dtype)
        torch.set_default_dtype(self.default_dtype)
        torch.set_float32_matmul_precision(self.precision)
        torch.use_deterministic_algorithms(self.deterministic, warn_only=warns)


_plain: dict[tuple, TorchModes] = {}  # without autocast
