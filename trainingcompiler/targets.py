"""Where a program is compiled for: the device of this process, or a described GPU that need not be there."""

import contextlib
import functools
import os
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from trainingcompiler import pages
from trainingcompiler.errors import TrainingCompilerError, UsageError
from trainingcompiler.gpus import Gpu, gpu

_WHEELS = ("jax_cuda13_plugin", "jax_cuda12_plugin")


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """The devices that a program is compiled for.

    Attributes:
        platform: `"cpu"`, `"cuda"`, or JAX's name of another platform.
        description: What a person calls the device, e.g. `"cpu, huge pages"` or `"NVIDIA H200"`.
        device_count: How many devices the target has.
        compute_capability: Major and minor, of a CUDA device.
        described: The GPU, where the target is a description: programs are compiled for it and cannot run. Their memory
            plans leave out the workspaces of cuDNN, which only a GPU tells.
    """

    platform: str
    description: str
    device_count: int
    compute_capability: tuple[int, int] | None = None
    described: Gpu | None = None

    @classmethod
    def local(cls) -> "Target":
        """The first device that JAX finds in this process."""
        device: Any = jax.devices()[0]
        platform, capability = device.platform, None
        if platform == "gpu" and "cuda" in device.client.platform_version:
            major, minor = device.compute_capability.split(".")
            platform, capability = "cuda", (int(major), int(minor))
        facts = [device.device_kind, pages.described(os.environ) if platform == "cpu" else ""]
        return cls(
            platform=platform,
            description=", ".join(filter(None, facts)),
            device_count=1,
            compute_capability=capability,
        )

    @classmethod
    def gpu(cls, name: str) -> "Target":
        """A described GPU: one of `gpus.GPUS`, which need not be in this machine.

        Args:
            name: Such as `"h200"`.

        Raises:
            UsageError: There is no description of it.
        """
        found = gpu(name)
        return cls(
            platform="cuda",
            description=found.name,
            device_count=1,
            compute_capability=found.compute_capability,
            described=found,
        )

    def sharding(self) -> SingleDeviceSharding | None:
        """Where the arrays of a program live; None is JAX's own default, the local device.

        Raises:
            UsageError: The target is a described GPU and XLA's compiler for GPUs is missing, or JAX did not load it.
            TrainingCompilerError: It is installed and refuses the description.
        """
        if self.described is None:
            return None
        return SingleDeviceSharding(_described_device(self.described))


_current: ContextVar[Target | None] = ContextVar("target", default=None)


@contextlib.contextmanager
def compiling_for(target: Target) -> Iterator[None]:
    """Makes `target` the answer of `current` inside: adapters lower some operators differently for a GPU."""
    token = _current.set(target)
    try:
        yield
    finally:
        _current.reset(token)


def current() -> Target | None:
    """The target that a program is being traced for; None outside of any compile."""
    return _current.get()


def compiles_for_gpus() -> bool:
    """Whether XLA's compiler for NVIDIA GPUs is installed, with or without a GPU."""
    return any(find_spec(wheel) for wheel in _WHEELS)


@functools.cache
def _described_device(described: Gpu) -> Any:
    if not compiles_for_gpus():
        raise UsageError(
            f"compiling for a described {described.name} needs XLA's compiler for GPUs, which is not installed: "
            'pip install "trainingcompiler[cuda12]", or [cuda13] (the same as "jax[cuda12]"; 4 GB of wheels, and '
            "neither a GPU nor a driver is needed)"
        )
    try:
        topology = topologies.get_topology_desc(
            platform="cuda",
            topology_name=described.name,
            target_config=described.description(),
            topology="1x1x1",  # partitions x hosts x devices
        )
    except NotImplementedError:
        raise UsageError(
            f"compiling for a described {described.name} needs XLA's compiler for GPUs, which is installed, and which "
            "JAX did not load: without a driver it does only where JAX_PLATFORMS=cpu is set before the start"
        ) from None
    except jax.errors.JaxRuntimeError as error:
        raise TrainingCompilerError(
            f"XLA did not accept the description of {described.name}: {error}. This is a bug of trainingcompiler, or "
            "of a version of JAX that it does not know: please report it."
        ) from error
    return topology.devices[0]
