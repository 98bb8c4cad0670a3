"""torch's modes: what kernels read of the process and not of their arguments."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch

from trainingcompiler.frameworks.pytorch.interop import cuda_autocast


class TorchModes(NamedTuple):
    """torch's modes around a call, which decide what the call computes."""

    grad: bool
    autocast: bool
    autocast_dtype: torch.dtype
    cuda_autocast: bool
    cuda_autocast_dtype: torch.dtype
    default_dtype: torch.dtype
    precision: str
    deterministic: bool

    @classmethod
    def now(cls) -> "TorchModes":
        """The modes that are set at this moment in this thread."""
        return cls(
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_enabled("cuda"),
            torch.get_autocast_dtype("cuda"),
            torch.get_default_dtype(),
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
        )

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Sets the modes for a replay."""
        outside = TorchModes.now()
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

    def _set(self, warns: bool) -> None:
        torch.set_autocast_enabled("cuda", self.cuda_autocast)
        torch.set_autocast_dtype("cuda", self.cuda_autocast_dtype)
        torch.set_default_dtype(self.default_dtype)
        torch.set_float32_matmul_precision(self.precision)
        torch.use_deterministic_algorithms(self.deterministic, warn_only=warns)
