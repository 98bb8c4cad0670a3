"""Where a program is compiled for: the device of this process, or a described GPU that need not be there."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Literal

import jax
from jax.experimental import topologies

from trainingcompiler.config import TrainingCompilerConfig
from trainingcompiler.errors import TrainingCompilerError, UsageError
from trainingcompiler.processes import rendezvous
from trainingcompiler.strategy import DP, FSDP, Strategy
from trainingcompiler.targets import huge_pages
from trainingcompiler.targets.gpus import GPUS, Gpu, gpu

_HOST = 8  # devices of a usual machine
# The compute capabilities that each of XLA's compilers for GPUs makes code for: what ptxas 12.9 and 13.5 list, less
# 10.1, on which XLA and 12.9 disagree. For any other, XLA fails halfway or ends the process.
_TOOLKITS = {
    "cuda12": "5.0 5.2 5.3 6.0 6.1 6.2 7.0 7.2 7.5 8.0 8.6 8.7 8.9 9.0 10.0 10.3 12.0 12.1".split(),
    "cuda13": "7.5 8.0 8.6 8.7 8.8 8.9 9.0 10.0 10.3 10.7 11.0 12.0 12.1".split(),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """The devices that a program is compiled for.

    Attributes:
        platform: `"cpu"`, `"cuda"`, or JAX's name of another platform.
        description: What a person calls the device, e.g. `"cpu, huge pages"` or `"NVIDIA H200"`.
        device_count: How many devices the target has; all of them run one program together.
        strategy: How several devices share the training.
        workers: Processes that each have such a device, and numbers of their own; see `parallel.spmd`.
        compute_capability: Major and minor, of a CUDA device.
        described: The GPU, where the target is a description: programs are compiled for it and cannot run. Their memory
            plans leave out the workspaces of cuDNN, which only a GPU tells.
    """

    platform: str
    description: str
    device_count: int
    strategy: Strategy = DP
    workers: int = 1
    compute_capability: tuple[int, int] | None = None
    described: Gpu | None = None

    @property
    def is_one_cpu(self) -> bool:
        """Whether it is the CPU of one process, whose memory torch and XLA share."""
        return self.platform == "cpu" and self.device_count == self.workers == 1

    @classmethod
    def local(cls, device_count: int | Literal["all"] = 1, strategy: Strategy = DP) -> "Target":
        """Devices that JAX finds in this process.

        Args:
            device_count: How many of them, the first ones.
            strategy: How several share the training.

        Raises:
            UsageError: There are fewer, or the strategy cannot share as many.
        """
        devices = jax.local_devices()
        count = len(devices) if device_count == "all" else device_count
        device: Any = devices[0]
        if count > len(devices):
            pretended = ""
            if device.platform == "cpu":
                pretended = f"; to try it out, JAX_NUM_CPU_DEVICES={count} lets one processor stand for {count} devices"
            raise UsageError(
                f"--devices={count}: this process has {len(devices)} ({device.device_kind}); give --devices=all or "
                f"fewer{pretended}"
            )
        strategy.check(count)
        platform, capability = device.platform, None
        if platform == "gpu" and "cuda" in device.client.platform_version:
            major, minor = device.compute_capability.split(".")
            platform, capability = "cuda", (int(major), int(minor))
        facts = [device.device_kind, huge_pages.described(os.environ) if platform == "cpu" else ""]
        return cls(
            platform=platform,
            description=", ".join(filter(None, [*facts, *_shared(count, strategy)])),
            device_count=count,
            strategy=strategy,
            compute_capability=capability,
        )

    @classmethod
    def of(cls, config: TrainingCompilerConfig) -> "Target":
        """The devices of this process that a configuration asks for.

        Raises:
            UsageError: See `local`; or a strategy that several processes do not have.
        """
        strategy, worker = Strategy.parse(config.strategy), rendezvous.current()
        if worker is None or worker.world_size == 1:
            return cls.local(config.devices, strategy)
        if strategy.tensor_parallel > 1:
            raise UsageError(
                f"--strategy={strategy} divides layers between the devices of one process, and this is rank "
                f"{worker.rank} of {worker.world_size}, which have batches of their own: give --devices=all instead of "
                "--nproc-per-node, or --strategy=fsdp, which divides the state between workers"
            )
        one = cls.local()
        description = f"{one.description}, state divided between {worker.world_size} workers"
        return replace(
            one,
            workers=worker.world_size,
            strategy=strategy,
            description=description if strategy.divides_state else one.description,
        )

    @classmethod
    def gpu(cls, name: str, device_count: int = 1, strategy: Strategy = FSDP) -> "Target":
        """Described GPUs of one kind: one of `gpus.GPUS`, which need not be in this machine.

        Args:
            name: Such as `"h200"`, or `"my_gpu.json"`; see `gpus.gpu`.
            device_count: How many of them.
            strategy: How several share the training.

        Raises:
            UsageError: There is no description of it, or the strategy cannot share as many.
        """
        strategy.check(device_count)
        found = gpu(name)
        return cls(
            platform="cuda",
            description=found.name if device_count == 1 else f"{device_count} x {found.name}, {strategy}",
            device_count=device_count,
            strategy=strategy,
            compute_capability=found.compute_capability,
            described=found,
        )

    @property
    def key(self) -> str:
        """What files about this target are called: its description, and a digest, as two GPUs may have one name."""
        facts = json.dumps(dataclasses.asdict(self), sort_keys=True)
        words = re.sub(r"[^A-Za-z0-9]+", "-", self.description)[:60].strip("-")
        return f"{words}-{hashlib.sha256(facts.encode()).hexdigest()[:12]}"

    @property
    def memory_bytes(self) -> int:
        """All of the memory of one device."""
        if self.described is not None:
            return self.described.memory_bytes
        device: Any = jax.local_devices()[0]
        limit = (device.memory_stats() or {}).get("bytes_limit")  # a CPU has no such statistics
        return limit or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def devices(self) -> tuple[Any, ...] | None:
        """What JAX calls the devices; None is its own default, the one local device.

        Raises:
            UsageError: The target is a described GPU and XLA's compiler for GPUs is missing, or JAX did not load it.
            TrainingCompilerError: It is installed and refuses the description.
        """
        if self.described is None:
            return tuple(jax.local_devices()[: self.device_count]) if self.device_count > 1 else None
        return _described_devices(self.described, self.device_count)


def _shared(count: int, strategy: Strategy) -> list[str]:
    return [f"{count} devices", str(strategy)] if count > 1 else []


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
    return bool(_installed())


def _installed() -> list[str]:
    return [toolkit for toolkit in _TOOLKITS if find_spec(f"jax_{toolkit}_plugin")]


def _check_toolkit(described: Gpu) -> None:
    """Refuses a GPU that what is installed makes no code for."""

    def capability(one: Gpu) -> str:
        return ".".join(map(str, one.compute_capability))

    able = [toolkit for toolkit, known in _TOOLKITS.items() if capability(described) in known]
    if not able:
        raise UsageError(
            f"XLA does not compile for {described.name}, of compute capability {capability(described)}: those of CUDA "
            f"12 are {', '.join(_TOOLKITS['cuda12'])}, and those of CUDA 13 {', '.join(_TOOLKITS['cuda13'])}. If it is "
            "a slip, mend the description."
        )
    install = "pip install " + " or ".join(f'"trainingcompiler[{toolkit}]"' for toolkit in able)
    installed = _installed()
    if not installed:
        raise UsageError(
            f"compiling for a described {described.name} needs XLA's compiler for GPUs, which is not installed: "
            f'{install} (the same as "jax[{able[0]}]"; 4 GB of wheels, and neither a GPU nor a driver is needed)'
        )
    for toolkit in installed:  # where two are, JAX loads one or the other
        if toolkit not in able:
            possible = [name for name, other in GPUS.items() if capability(other) in _TOOLKITS[toolkit]]
            raise UsageError(
                f"CUDA {toolkit[4:]}, which is installed, does not compile for {described.name}, of compute capability "
                f"{capability(described)}, but for {', '.join(_TOOLKITS[toolkit])}. Either pip uninstall "
                f"jax-{toolkit}-plugin jax-{toolkit}-pjrt, and {install}; or take another described GPU: "
                f"{', '.join(possible)}"
            )


@functools.cache
def _described_devices(described: Gpu, count: int) -> tuple[Any, ...]:
    _check_toolkit(described)
    try:
        topology = topologies.get_topology_desc(
            platform="cuda",
            topology_name=described.name,
            target_config=described.description(),
            topology=_topology(count),
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
    return tuple(topology.devices)


def _topology(count: int) -> str:
    """Partitions x hosts x devices of one host, as JAX wants it: whole hosts where they divide the devices."""
    hosts = count // _HOST if count % _HOST == 0 else 1
    return f"1x{hosts}x{count // hosts}"
