"""A worker's first minute: which of how many it is, where the others are, and whether they all run the same.

`current` answers from then on. Whoever started the workers, torch's variables are set for the script, `TF_CONFIG` for
TensorFlow, and JAX's processes know each other.
"""

import atexit
import functools
import hashlib
import json
import os
import platform
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, MutableMapping
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trainingcompiler.config import COORDINATOR
from trainingcompiler.errors import UsageError
from trainingcompiler.exit_codes import REQUEUE
from trainingcompiler.processes import cluster_env, handshake
from trainingcompiler.processes.cluster_env import Worker
from trainingcompiler.processes.handshake import Address
from trainingcompiler.processes.host_resources import free_ports, gpu_count

JOIN_TIMEOUT_S = 300.0
"""How long workers wait for each other."""

# A thread that waits for the GIL while Python ends is unwound, which aborts the process where it stands in a destructor
# of C++, until Python 3.14 (https://github.com/python/cpython/issues/87135). torch's gloo lets go of a Python object
# after each averaging: of scripts that end with a step, one in six aborted under torchrun, and none that slept 10 ms.
_LAST_TURN_S = 0.02

_PACKAGES = ("trainingcompiler", "jax", "jaxlib", "torch", "tensorflow", "keras")
_MEMORY = ("XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION")
_MOST = ".95"  # of the GPU's memory, as XLA needs it: JAX's own limit is .75, of memory taken in advance

_current: Worker | None = None
_left_with: int | None = None
_start_later: Callable[[], None] | None = None


def current() -> Worker | None:
    """Which of several workers this process is; None where the script is alone, or has not been joined."""
    return _current


def join(
    environ: MutableMapping[str, str],
    *,
    compiled: bool = True,
    script: tuple[str, str] | None = None,
    timeout_s: float = JOIN_TIMEOUT_S,
) -> Worker | None:
    """Meets the other workers, if the environment says that there are any.

    Before the script, and before JAX has started a backend.

    Args:
        environ: Read for torchrun's, Slurm's or Open MPI's variables. Of torch's, and `TF_CONFIG`, those that are
            missing are set.
        compiled: Whether JAX's processes are to know each other.
        script: "script" or "module", and its name: the same on all.
        timeout_s: Seconds to wait for the others.

    Returns:
        Which worker this is; None where there are no others and nobody says that this is one.

    Raises:
        UsageError: The variables contradict each other, rank 0 cannot be reached, somebody does not come, or something
            else runs there. Of a mistake that all learn of, rank 0 tells; the others leave with code 2.
    """
    global _current, _start_later
    found = cluster_env.read(environ)
    if found is None:
        return None
    worker = found.worker
    if worker.world_size > 1:
        _check_gpus(worker, environ)
        hello = {"host": socket.gethostname(), "port": free_ports(1)[0], "facts": facts(script)}
        find_address = _address_of(found, environ, timeout_s)
        if worker.rank == 0:
            answer = handshake.serve(worker, find_address(), hello, timeout_s)
        else:
            answer = handshake.ask(worker, find_address, hello, timeout_s)
        if answer.mistake and worker.rank == 0:
            raise UsageError(answer.mistake)
        if answer.mistake:
            sys.exit(2)
        _set_variables(found, answer.services, environ)
        if sys.version_info < (3, 14):
            atexit.register(time.sleep, _LAST_TURN_S)  # it runs after whatever the script registers
        if compiled:
            _start_jax(worker, find_address(), environ, timeout_s)
        else:
            _start_later = functools.partial(_start_jax, worker, find_address(), dict(environ), timeout_s)
    _current = worker
    return worker


def store() -> Any:
    """JAX's store of keys, which all workers share.

    Where their steps are not compiled it is started now, by all at the same time.
    """
    global _start_later
    start, _start_later = _start_later, None
    if start is not None:
        start()
    from jax._src import distributed  # there is no public name for it

    return distributed.global_state.client


def refuse_several(what: str) -> None:
    """Refuses what trains in one process where there are several: each would train a model of its own.

    Args:
        what: What cannot, as a sentence begins: "Keras on tensorflow".

    Raises:
        UsageError: There are several workers.
    """
    worker = current()
    if worker is not None and worker.world_size > 1:
        raise UsageError(
            f"{what} is compiled for one process, and this is rank {worker.rank} of {worker.world_size}: each would "
            "train a model of its own. To train on several devices, leave --nproc-per-node out and give --devices=all; "
            "to run a script that knows of several processes as it is, give --no-compile"
        )


def facts(script: tuple[str, str] | None) -> dict[str, str]:
    """What has to be the same on all workers, by name."""
    found = {"Python": ".".join(platform.python_version_tuple()[:2])}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if script is not None:
        kind, name = script
        path = Path(name) if kind == "script" else _file_of(name)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path is not None and path.is_file() else ""
        found[f"{kind} {Path(name).name}"] = digest or "without a file"
    return found


def abandon(code: int) -> None:
    """Lets this process leave at once, with `code` (minus a signal's number), when all else is done at its exit.

    JAX's workers wait for each other when they leave. One that has failed must not: the others may wait for it.
    """
    global _left_with
    if code != REQUEUE:
        _left_with = code


def leaves_alone() -> bool:
    """Whether this process leaves without waiting for the others."""
    return _left_with is not None


def share_gpus(environ: MutableMapping[str, str]) -> str:
    """Has XLA take GPU memory as it needs it, where torch is on the same GPU, unless the person has said otherwise.

    Returns:
        What to tell the person; "" where nothing was changed.
    """
    if any(name in environ for name in _MEMORY) or not _uses_gpus(environ) or not _torch_uses_cuda():
        return ""
    environ[_MEMORY[0]] = "false"
    environ[_MEMORY[1]] = _MOST
    return (
        f"{_MEMORY[0]}=false {_MEMORY[1]}={_MOST}: PyTorch and XLA share the GPU's memory, so XLA takes none of it in "
        "advance, and more than its usual 75% if it needs it"
    )


def _torch_uses_cuda() -> bool:
    try:
        return not metadata.version("torch").endswith("+cpu")
    except metadata.PackageNotFoundError:
        return False


def _uses_gpus(environ: Mapping[str, str]) -> bool:
    """Whether JAX will, as far as can be told without starting it."""
    if environ.get("JAX_PLATFORMS", "cuda").split(",")[0] not in ("cuda", "gpu", ""):
        return False
    plugins = (find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
    return any(plugin is not None for plugin in plugins) and gpu_count(environ) > 0


def _check_gpus(worker: Worker, environ: Mapping[str, str]) -> None:
    if not _uses_gpus(environ):
        return
    gpus = gpu_count(environ)
    if 1 < gpus < worker.local_world_size:  # one may be each worker's own, as with srun --gpus-per-task=1
        raise UsageError(
            f"{worker.local_world_size} workers on this host, and each sees {gpus} GPUs: one each is needed. Start "
            "fewer workers, or set JAX_PLATFORMS=cpu and CUDA_VISIBLE_DEVICES= to train on the CPU"
        )


def _address_of(
    found: cluster_env.ClusterEnvironment, environ: Mapping[str, str], timeout_s: float
) -> Callable[[], Address]:
    """Returns the function that says where JAX's processes meet; on rank 0 it is asked once."""
    if COORDINATOR in environ:
        host, _, port = environ[COORDINATOR].rpartition(":")
        return lambda: (host, int(port))
    if environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and found.master is not None:
        meeting = import_module("trainingcompiler.launchers.torchelastic_store")
        agreed = functools.partial(meeting.agree, environ, found.worker.rank == 0, timeout_s)
        return functools.cache(agreed) if found.worker.rank == 0 else agreed
    if found.master is None:
        raise UsageError(
            f"{found.source}, and nothing says where rank 0 is: set MASTER_ADDR to its host, and MASTER_PORT to a port "
            "of it that is free, as is the next one"
        )
    host, master_port = environ.get("MASTER_ADDR", found.master[0]), int(environ.get("MASTER_PORT", found.master[1]))
    return lambda: (host, master_port + 1)


def _set_variables(
    found: cluster_env.ClusterEnvironment, services: tuple[str, ...], environ: MutableMapping[str, str]
) -> None:
    worker = found.worker
    values: dict[str, Any] = {
        "RANK": worker.rank,
        "WORLD_SIZE": worker.world_size,
        "LOCAL_RANK": worker.local_rank,
        "LOCAL_WORLD_SIZE": worker.local_world_size,
        "NODE_RANK": found.node_rank,
        "GROUP_RANK": found.node_rank,
    }
    if found.master is not None:
        values |= {"MASTER_ADDR": found.master[0], "MASTER_PORT": found.master[1]}
    cluster = {"cluster": {"worker": list(services)}, "task": {"type": "worker", "index": worker.rank}}
    for name, value in {**values, "TF_CONFIG": json.dumps(cluster)}.items():
        environ.setdefault(name, str(value))


def _start_jax(worker: Worker, address: Address, environ: Mapping[str, str], timeout_s: float) -> None:
    import jax

    if "JAX_ENABLE_PREEMPTION_SERVICE" not in environ:
        # It would take SIGTERM for itself, and a script that is told to end would not.
        jax.config.update("jax_enable_preemption_service", False)
    devices = None
    if _uses_gpus(environ) and gpu_count(environ) >= worker.local_world_size:
        devices = [worker.local_rank]
    host, port = address
    jax.distributed.initialize(
        coordinator_address=f"{host}:{port}",
        num_processes=worker.world_size,
        process_id=worker.rank,
        local_device_ids=devices,
        cluster_detection_method="deactivate",  # it has been found out already, from more sources
        initialization_timeout=int(timeout_s) + 1,
        coordinator_bind_address=f"{host}:{port}" if host in ("127.0.0.1", "localhost") else None,
    )
    atexit.register(_leave, os.getpid())  # after JAX's own, so that it runs before it


def _leave(process: int) -> None:
    if _left_with is None or os.getpid() != process:
        return
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            stream.flush()
    if _left_with < 0:
        signal.signal(-_left_with, signal.SIG_DFL)
        os.kill(process, -_left_with)
    os._exit(_left_with & 0xFF)


def _file_of(module: str) -> Path | None:
    if "." in module:  # to find it would import its package, before the workers have met
        return None
    spec = find_spec(module)
    return Path(spec.origin) if spec is not None and spec.origin is not None else None
