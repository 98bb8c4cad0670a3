"""What this machine has for workers: processors, GPUs, free ports."""

import contextlib
import ctypes
import os
import random
import socket
from collections.abc import Mapping

_PORTS = range(20000, 32000)  # below the ports that systems hand out to connections, which could take one in between
_NVML_SUCCESS = 0


def cpu_count() -> int:
    """Processors that this process may use."""
    with contextlib.suppress(AttributeError):  # only Linux tells
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def gpu_count(environ: Mapping[str, str]) -> int:
    """NVIDIA GPUs that a process started with `environ` sees, told by the driver: no framework is imported."""
    count = _installed_gpus()
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return count
    named = [word.strip() for word in visible.split(",")]
    # CUDA stops at the first that there is not, such as -1.
    seen = 0
    for word in named:
        if not word or word.startswith("-") or (word.isdecimal() and int(word) >= count):
            break
        seen += 1
    return min(seen, count)


def _installed_gpus() -> int:
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return 0
    count = ctypes.c_uint()
    if nvml.nvmlInit_v2() != _NVML_SUCCESS or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != _NVML_SUCCESS:
        return 0
    nvml.nvmlShutdown()
    return count.value


def is_free(port: int, host: str = "") -> bool:
    """Whether a server could listen on a port of this machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def free_ports(count: int) -> list[int]:
    """Different ports that nobody listens on now.

    Raises:
        OSError: There are not so many.
    """
    found: list[int] = []
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        if len(found) == count:
            return found
        if is_free(port):
            found.append(port)
    raise OSError(f"{count} free ports were looked for between {_PORTS[0]} and {_PORTS[-1]}: {len(found)} are free")
