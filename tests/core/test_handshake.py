"""The first words between workers: who comes, who does not, and who runs something else."""

import socket
import threading

import pytest

from trainingcompiler.errors import UsageError
from trainingcompiler.processes import handshake
from trainingcompiler.processes.cluster_env import Worker
from trainingcompiler.processes.host_resources import free_ports

HOST = "127.0.0.1"


def worker(rank: int, size: int = 2) -> Worker:
    return Worker(rank=rank, world_size=size, local_rank=rank, local_world_size=size)


def hello(host: str = "here", port: int = 1, **facts: str) -> dict:
    return {"host": host, "port": port, "facts": facts}


def meet(*others, size: int = 2, timeout_s: float = 30.0, first=None):
    """Rank 0's answer, and those that the others got; `others` are pairs of a worker and its hello."""
    address = HOST, free_ports(1)[0]
    answers: list = [None] * len(others)

    def ask(place, who, said):
        answers[place] = handshake.ask(who, lambda: address, said, timeout_s)

    threads = [threading.Thread(target=ask, args=(place, *other)) for place, other in enumerate(others)]
    for thread in threads:
        thread.start()
    answer = handshake.serve(worker(0, size), address, first or hello(port=10), timeout_s)
    for thread in threads:
        thread.join()
    return answer, answers


def test_all_come_and_learn_of_each_other():
    answer, others = meet((worker(2, 3), hello(port=12)), (worker(1, 3), hello(port=11)), size=3)
    assert answer == handshake.Answer(mistake="", services=(f"{HOST}:10", f"{HOST}:11", f"{HOST}:12"))
    assert others == [answer, answer]


def test_one_that_runs_something_else():
    first = hello("one", torch="2.13", jax="0.10")
    answer, (other,) = meet((worker(1), hello("two", torch="2.12", jax="0.10", keras="3")), first=first)
    assert answer.mistake == other.mistake == (
        "the workers do not run the same, and would not train one model:\n"
        "  rank 1 on two: keras 3; rank 0 on one: none\n"
        "  rank 1 on two: torch 2.12; rank 0 on one: 2.13\n"
        "Install and copy the same to all"
    )  # fmt: skip


def test_somebody_does_not_come():
    answer, (other,) = meet((worker(1, 4), hello()), size=4, timeout_s=0.5)
    assert "for 4 workers, and rank 2, 3 did not come. Are they started" in answer.mistake
    assert other.mistake == answer.mistake


def test_two_with_one_rank_and_two_sizes():
    answer, _ = meet((worker(0), hello("two")))
    assert answer.mistake == "two workers say that they are rank 0, on here and on two"
    answer, _ = meet((worker(1, 3), hello("two")))
    assert answer.mistake == "rank 1 on two knows of 3 workers, and rank 0 of 2"


def test_a_port_that_is_taken():
    with socket.create_server((HOST, 0)) as server, pytest.raises(UsageError) as refused:
        handshake.serve(worker(0), (HOST, server.getsockname()[1]), hello(), 1)
    assert "rank 0 cannot listen on port" in str(refused.value) and "give another --master-port" in str(refused.value)


def test_nobody_is_there():
    port = free_ports(1)[0]
    with pytest.raises(UsageError) as refused:
        handshake.ask(worker(1), lambda: (HOST, port), hello("two"), 0.3)
    assert str(refused.value).startswith(
        f"rank 1 on two cannot reach rank 0 at {HOST}:{port}, tried for 0.3 s: Connection refused. Is rank 0 running "
        "there"
    )


def test_a_name_that_nobody_knows():
    with pytest.raises(UsageError, match=r"rank 1 on here cannot reach rank 0 at nowhere.invalid:1, tried for 0 s: "):
        handshake.ask(worker(1), lambda: ("nowhere.invalid", 1), hello(), 0)


def test_somebody_else_listens():
    with socket.create_server((HOST, 0)) as server:
        threading.Thread(target=lambda: server.accept()[0].close(), daemon=True).start()
        with pytest.raises(UsageError, match="somebody else may listen there"):
            handshake.ask(worker(1), lambda: server.getsockname()[:2], hello(), 0)


def test_a_scanner_does_not_disturb():
    address = HOST, free_ports(1)[0]
    answers: list = []
    serving = threading.Thread(target=lambda: answers.append(handshake.serve(worker(0), address, hello(), 30)))
    serving.start()
    for said in (b"", b"GET / HTTP/1.1\r\n\r\n\n", b"[1]\n"):
        while True:
            try:
                with socket.create_connection(address) as scanner:
                    scanner.sendall(said)
                break
            except ConnectionRefusedError:
                pass  # it does not listen yet
    assert handshake.ask(worker(1), lambda: address, hello(), 30).mistake == ""
    serving.join()
    assert answers[0].mistake == ""
