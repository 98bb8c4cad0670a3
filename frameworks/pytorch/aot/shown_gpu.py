"""A described GPU, shown to a script that is planned for it: the script asks for it, and its tensors are on the CPU.

Values do not matter to a plan, so a stand-in on the CPU is as good as a tensor on a GPU. From the first one that the
script wants there, steps are captured as a GPU's are (`devices`).
"""

import contextlib
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from trainingcompiler.frameworks.pytorch.interop import devices
from trainingcompiler.frameworks.pytorch.tape.deferred_tensor import DeferredTensor
from trainingcompiler.targets.gpus import Gpu

_GPU = torch.device("cuda", 0)
_DONE_ALREADY = (
    "set_device", "synchronize", "empty_cache", "manual_seed", "manual_seed_all", "reset_peak_memory_stats",
    "set_rng_state", "set_rng_state_all",
)  # fmt: skip
_NOTHING_HELD = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")


class ShownGpu(TorchFunctionMode):
    """While it is entered, `torch.cuda` has one GPU, the described one, and what is wanted there is made on the CPU."""

    def __init__(self, gpu: Gpu):
        super().__init__()
        self._gpu = gpu
        self._patches = contextlib.ExitStack()

    def __enter__(self) -> Any:
        for name, answer in _answers(self._gpu).items():
            self._patches.enter_context(mock.patch.object(torch.cuda, name, answer))
        self._patches.callback(devices.stand_for, None)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Runs the function, on the CPU if it is one for a GPU; what is deferred is the session's."""
        kwargs = kwargs or {}
        if args and isinstance(args[0], DeferredTensor):
            return function(*args, **kwargs)
        if getattr(function, "__name__", "") == "pin_memory":
            return args[0]
        if devices.asks_for_gpu(function, args, kwargs):
            devices.stand_for(_GPU)
            if getattr(function, "__name__", "") == "cuda":
                return args[0]
            args, kwargs = devices.on_cpu(function, args, kwargs)
        return function(*args, **kwargs)


def _answers(gpu: Gpu) -> dict[str, Any]:
    """What `torch.cuda` says of the GPU, and what it does with it: nothing."""
    major, minor = gpu.compute_capability
    properties = SimpleNamespace(
        name=gpu.name, total_memory=gpu.memory_bytes, major=major, minor=minor, multi_processor_count=gpu.cores
    )
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "is_bf16_supported": lambda *_, **__: "bfloat16" in gpu.flops,
        "get_device_name": lambda *_: gpu.name,
        "get_device_capability": lambda *_: (major, minor),
        "get_device_properties": lambda *_: properties,
        "mem_get_info": lambda *_: (gpu.memory_bytes, gpu.memory_bytes),
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "get_rng_state_all": lambda: [torch.get_rng_state()],
    }
    answers |= {name: lambda *_, **__: None for name in _DONE_ALREADY}
    return answers | {name: lambda *_, **__: 0 for name in _NOTHING_HELD}
