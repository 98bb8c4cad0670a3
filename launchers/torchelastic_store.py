"""Asks the store of torch's agent, which workers of torchrun share, where JAX's processes are to meet."""

import socket
from collections.abc import Mapping
from datetime import timedelta

from trainingcompiler.processes.host_resources import free_ports


def agree(environ: Mapping[str, str], is_first: bool, timeout_s: float) -> tuple[str, int]:
    """Rank 0 chooses one of its ports, and tells; the others are told.

    Args:
        environ: With torchrun's variables.
        is_first: Whether this is rank 0.
        timeout_s: Seconds to wait for it.

    Returns:
        Host and port. After a restart it may be that of the workers before, until rank 0 has told the new one.
    """
    from torch.distributed import TCPStore

    host, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    timeout = timedelta(seconds=timeout_s)
    store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
    attempt = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    key = f"trainingcompiler/{environ['TORCHELASTIC_RUN_ID']}/{attempt}/coordinator"
    if is_first:
        store.set(key, _own_address(environ))
    found, _, chosen = store.get(key).decode().rpartition(":")
    return found, int(chosen)


def _own_address(environ: Mapping[str, str]) -> str:
    # MASTER_ADDR is the host of the store. With c10d that is the host that was named as the meeting place, and rank 0
    # may run on another one: it says its own address, as the store's host sees it.
    with socket.create_connection((environ["MASTER_ADDR"], int(environ["MASTER_PORT"]))) as connection:
        host = connection.getsockname()[0]
    return f"{host}:{free_ports(1)[0]}"
