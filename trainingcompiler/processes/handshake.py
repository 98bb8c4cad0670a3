"""The first words between workers, before anything that cannot be undone: who is there, and do all run the same?

XLA's own service ends a process, with a trace of C++, where somebody does not come. So the workers meet here first, on
the same port: each says who it is, and rank 0 answers all when all have come.
"""

import contextlib
import json
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trainingcompiler.errors import UsageError
from trainingcompiler.processes.cluster_env import Worker

Address = tuple[str, int]

_HELLO_TIMEOUT_S = 5.0  # a port scanner says nothing
_RETRY_S = 0.2
_LONGEST = 2**20


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What rank 0 says to all.

    Attributes:
        mistake: Why the job cannot run; "" where it can.
        services: `"host:port"` of each worker, for TensorFlow.
    """

    mistake: str
    services: tuple[str, ...]


def serve(worker: Worker, address: Address, hello: Mapping[str, Any], timeout_s: float) -> Answer:
    """Rank 0's part: waits for all, compares, and answers.

    Args:
        worker: This one.
        address: Where to listen.
        hello: "host", "port" and "facts" of this worker; facts are text by name, and have to be the same on all.
        timeout_s: Seconds to wait for all.

    Raises:
        UsageError: The port is taken.
    """
    present: dict[int, tuple[socket.socket | None, Mapping[str, Any]]] = {0: (None, hello)}
    mistake = ""
    deadline_s = time.monotonic() + timeout_s
    with contextlib.ExitStack() as open_sockets, _listen(address) as server:
        while len(present) < worker.world_size and not mistake:
            server.settimeout(max(0.01, deadline_s - time.monotonic()))
            try:
                connection, (peer, *_) = server.accept()
            except TimeoutError:
                absent = [str(rank) for rank in range(worker.world_size) if rank not in present]
                mistake = (
                    f"waited {timeout_s:g} s at {address[0]}:{address[1]} for {worker.world_size} workers, and rank "
                    f"{', '.join(absent)} did not come. Are they started, with the same WORLD_SIZE, MASTER_ADDR and "
                    "MASTER_PORT, and can their hosts reach this one?"
                )
                break
            open_sockets.enter_context(connection)
            said = _receive(connection, _HELLO_TIMEOUT_S)
            if said is None or "rank" not in said:
                continue
            rank = said["rank"]
            mistake = _mismatch(worker, said, present)
            present[rank] = connection, {**said, "address": f"{peer}:{said['port']}"}
        mistake = mistake or differences({rank: content for rank, (_, content) in present.items()})
        own = f"{address[0]}:{hello['port']}"
        services = [present[rank][1].get("address", own) for rank in sorted(present)]
        answer = Answer(mistake=mistake, services=tuple(services))
        for waiting, _ in present.values():
            if waiting is not None:
                _send(waiting, {"mistake": mistake, "services": services})
    return answer


def ask(worker: Worker, find_address: Callable[[], Address], hello: Mapping[str, Any], timeout_s: float) -> Answer:
    """The part of all others: says hello, and waits for the answer.

    Args:
        worker: This one.
        find_address: Returns where rank 0 is; called again where it cannot be reached there.
        hello: As for `serve`.
        timeout_s: Seconds to go on trying, and then to wait for the others.

    Raises:
        UsageError: Rank 0 cannot be reached.
    """
    deadline_s = time.monotonic() + timeout_s
    while True:
        address = find_address()
        try:
            with socket.create_connection(address, timeout=_HELLO_TIMEOUT_S) as connection:
                _send(connection, {"rank": worker.rank, "world_size": worker.world_size, **hello})
                # A little longer than rank 0 waits for the last one: it knows who is missing.
                said = _receive(connection, max(0.0, deadline_s - time.monotonic()) + 2 * _HELLO_TIMEOUT_S)
                if said is not None and "mistake" in said:
                    return Answer(mistake=said["mistake"], services=tuple(said["services"]))
                reason = "it closed the connection without a word: somebody else may listen there"
        except OSError as error:
            reason = error.strerror or str(error) or type(error).__name__
        if time.monotonic() > deadline_s:
            raise UsageError(
                f"rank {worker.rank} on {hello['host']} cannot reach rank 0 at {address[0]}:{address[1]}, tried for "
                f"{timeout_s:g} s: {reason}. Is rank 0 running there, can its name be resolved on this host, and is "
                "the port open between them? --master-addr and --master-port, or --rdzv-endpoint, give another place"
            )
        time.sleep(_RETRY_S)


def differences(said: Mapping[int, Mapping[str, Any]]) -> str:
    """What differs from rank 0, as one message; "" where nothing does."""
    first = said[0]
    lines = []
    for rank, content in sorted(said.items()):
        facts = content["facts"]
        for name in sorted({*first["facts"], *facts}):
            here, there = first["facts"].get(name, "none"), facts.get(name, "none")
            if here != there:
                lines.append(f"  rank {rank} on {content['host']}: {name} {there}; rank 0 on {first['host']}: {here}")
    if not lines:
        return ""
    return "\n".join(
        ["the workers do not run the same, and would not train one model:", *lines, "Install and copy the same to all"]
    )


def _mismatch(worker: Worker, said: Mapping[str, Any], present: Mapping[int, Any]) -> str:
    rank, size = said["rank"], said["world_size"]
    if size != worker.world_size:
        return f"rank {rank} on {said['host']} knows of {size} workers, and rank 0 of {worker.world_size}"
    if rank in present:
        other = present[rank][1]["host"]
        return f"two workers say that they are rank {rank}, on {other} and on {said['host']}"
    return ""


def _listen(address: Address) -> socket.socket:
    host, port = address
    local = host in ("localhost", "127.0.0.1")
    try:
        return socket.create_server(("127.0.0.1" if local else "", port), backlog=socket.SOMAXCONN)
    except OSError as error:
        raise UsageError(
            f"rank 0 cannot listen on port {port} of this host: {error.strerror}. Another job may use it; give another "
            "--master-port"
        ) from None


def _send(connection: socket.socket, content: Mapping[str, Any]) -> None:
    with contextlib.suppress(OSError):  # one that has gone learns nothing, and nothing is to be learned from it
        connection.sendall(json.dumps(content).encode() + b"\n")


def _receive(connection: socket.socket, timeout_s: float) -> dict[str, Any] | None:
    """The one line that a connection says; None where it says anything else."""
    connection.settimeout(timeout_s)
    received = b""
    try:
        while not received.endswith(b"\n"):
            chunk = connection.recv(2**16)
            if not chunk or len(received) > _LONGEST:
                return None
            received += chunk
        content = json.loads(received)
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
