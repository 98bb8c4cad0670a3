"""Scripts whose tensors lie on a GPU: what their code is shown while it is captured, and where values come from.

A step is captured on stand-ins on the CPU, whatever the device: there is one operator table, and a step for a GPU can
be captured where there is none. The script's own code is shown the device that it expects, and what it asks for there
is made on the CPU.
"""

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import jax
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import _get_current_function_mode
from torch.utils import checkpoint
from torch.utils._device import _device_constructors

CPU = torch.device("cpu")
_PHILOX_STEP = 4  # torch's CUDA generator counts in fours
_stood_for: torch.device | None = None  # a GPU that is described, and not there
_SHOWN = frozenset({"device", "is_cuda", "is_cpu", "get_device"})


def of(tensors: Iterable[torch.Tensor]) -> torch.device | None:
    """The device that tensors are on, as the first one says; None where there are none."""
    first = next(iter(tensors), None)
    return None if first is None else _stood_for or first.device


def stand_for(device: torch.device | None) -> None:
    """Has tensors on the CPU be taken for ones on a GPU that is not there, from now on; None ends it."""
    global _stood_for
    _stood_for = device


@functools.cache
def is_reachable(device: torch.device) -> bool:
    """Whether steps can read and write tensors on a device of torch's: the CPU, and the GPU that XLA computes on."""
    if device.type != "cuda":
        return device.type == "cpu"
    own: Any = jax.local_devices()[0]
    return own.platform == "gpu" and device.index in (None, own.local_hardware_id)


def cure(device: torch.device) -> str:
    """What to add where a tensor's device is not reachable."""
    if device.type != "cuda" or is_reachable(device):
        return ""
    found = jax.local_devices()[0]
    if found.platform != "cpu":
        return f", and XLA computes on {found}: CUDA_VISIBLE_DEVICES can show this process one GPU alone"
    return ", and JAX finds no GPU: pip install 'trainingcompiler[cuda13]', or [cuda12], as torch.version.cuda says"


def finish(device: torch.device) -> None:
    """Waits for what torch has been asked to compute on a device, in a GPU's current stream."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def drawn_seed(device: torch.device) -> int:
    """A seed from torch's generator of a device, which is another one afterwards.

    On a GPU it is made of the generator's seed and offset, which torch keeps on the host: nothing waits for the GPU.
    """
    if device.type == "cpu" or _stood_for is not None:
        return int(torch.empty((), dtype=torch.int64).random_())
    generator = torch.cuda.default_generators[device.index or 0]
    offset = generator.get_offset()
    generator.set_offset(offset + _PHILOX_STEP)
    digest = hashlib.blake2b(f"{generator.initial_seed()} {offset}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # an int64, and not negative


def generator_state(device: torch.device) -> Any:
    """What is equal at two moments if nothing has been drawn between them."""
    state = torch.get_rng_state().numpy().tobytes()
    if device.type == "cpu" or _stood_for is not None:
        return state
    generator = torch.cuda.default_generators[device.index or 0]
    return state, generator.initial_seed(), generator.get_offset()


def shown(name: str, device: torch.device) -> Any:
    """What a tensor on a device says of it: `device`, `is_cuda`, `is_cpu`, or `get_device()`."""
    if name == "device":
        return device
    if name == "get_device":
        return -1 if device.type == "cpu" else device.index
    return device.type == name.removeprefix("is_")


def is_shown(name: str) -> bool:
    """Whether `shown` has an answer."""
    return name in _SHOWN


def leads_away(function: Callable, args: tuple, kwargs: dict, device: torch.device) -> bool:
    """Whether a function of a tensor on `device` returns it on another one: `loss.cpu()`, `x.to("cpu")`."""
    name = getattr(function, "__name__", "")
    if device.type == "cpu" or name not in ("cpu", "to"):
        return False
    if name == "cpu":
        return True
    asked = [_device_of(value, name) for value in (*args[1:], *kwargs.values())]
    return any(other is not None and other.type != device.type for other in asked)


@contextlib.contextmanager
def pretended(mode: Any, device: torch.device) -> Iterator[None]:
    """Shows a device to Python code that asks stand-ins for theirs, while a function mode is the innermost one.

    Below that mode are torch's own functions, which have to see the truth.
    """
    if device.type == "cpu":
        yield
        return
    true: Any = FakeTensor.__dict__["device"]

    def of_stand_in(tensor: FakeTensor) -> torch.device:
        return device if _get_current_function_mode() is mode else true.fget(tensor)

    # Checkpointing compares what it is shown in forward with what it is shown in backward, on both sides of the mode.
    compared = mock.patch.dict(checkpoint._allowed_determinism_checks_to_fns, default=_shape_and_dtype)
    with mock.patch.object(FakeTensor, "device", property(of_stand_in)), compared:
        yield


def _shape_and_dtype(tensor: torch.Tensor) -> tuple:
    return tensor.shape, tensor.dtype


def on_cpu(function: Callable, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The arguments with which a function makes on the CPU what it was to make on a GPU."""
    name = getattr(function, "__name__", "")
    args = tuple(CPU if _device_of(value, name) is not None else value for value in args)
    kwargs = {key: CPU if key == "device" or _device_of(value, "") else value for key, value in kwargs.items()}
    if "device" not in kwargs and function in _device_constructors():
        kwargs["device"] = CPU  # or `torch.set_default_device` says where
    if kwargs.get("pin_memory"):
        kwargs["pin_memory"] = False
    return args, kwargs


def asks_for_gpu(function: Callable, args: tuple, kwargs: dict) -> bool:
    """Whether a function is to make something on a GPU, or to move it there."""
    name = getattr(function, "__name__", "")
    asked = [_device_of(value, name) for value in args] if name == "to" else []  # elsewhere it stands by its name
    if "device" in kwargs:
        asked.append(_device_of(kwargs["device"], "to"))
    elif function in _device_constructors() and not any(asked):
        asked.append(torch.get_default_device())
    return name == "cuda" or any(device is not None and device.type == "cuda" for device in asked)


def _device_of(value: Any, name: str) -> torch.device | None:
    """The device that an argument of a function names."""
    if isinstance(value, torch.device):
        return value
    if isinstance(value, str) and value.partition(":")[0] in ("cpu", "cuda"):
        return torch.device(value)
    if name == "to" and type(value) is int:
        return torch.device("cuda", value)
    return None
