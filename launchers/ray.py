"""Starts workers on a Ray cluster: the one of RAY_ADDRESS, or one on this machine for the time of the job.

Ray places one actor for each worker; the worker is a process of its own, as with every launcher. It is started in the
folder the launcher was started in, which each host has to have.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from trainingcompiler.cli.job import Job
from trainingcompiler.config import COORDINATOR, FAILURE
from trainingcompiler.errors import UsageError
from trainingcompiler.exit_codes import REQUEUE
from trainingcompiler.launchers.messages import described, exit_code, say, shell_line
from trainingcompiler.processes.host_resources import cpu_count, free_ports

PLACEMENT_TIMEOUT_S = 300.0
"""How long the cluster may take to find, or to start, hosts for the workers."""
_KILL_GRACE_S = 20.0
_POLL_S = 0.5


def launch(job: Job) -> NoReturn:
    """Runs the workers until they are done, and leaves with the exit code of the first that failed.

    Raises:
        UsageError: Ray is not installed, its cluster cannot be reached, or has no room.
    """
    count = job.max_nodes * (job.nproc_per_node or 1)
    if job.dry_run:
        sys.stdout.write(f"# cluster: {os.environ.get('RAY_ADDRESS', 'of this machine')}\n")
        sys.stdout.write(f"# hosts: {job.max_nodes} x {_bundle(job)}\n")
        environments = [{**os.environ, **job.variables, **_ranks(job, rank)} for rank in range(count)]
        sys.stdout.write("".join(shell_line(job.command, environment) for environment in environments))
        sys.exit(0)
    try:
        import ray
    except ImportError:
        raise UsageError(
            '--launcher=ray needs Ray, which is not installed: pip install "trainingcompiler[ray]"'
        ) from None
    with _cluster(ray, count, job), _listening() as received:  # in this order: Ray has a handler of its own
        code, report, error = _run(ray, job, count, received)
    # Now, when Ray has shown what the workers said: the error is to be the last word.
    if report:
        say(report)
    sys.stderr.write(error)
    sys.exit(code)


class Host:
    """An actor: what Ray runs where a worker is to run."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._stopped = threading.Event()

    def address(self) -> tuple[str, int, int]:
        """This host as the others reach it, and two free ports of it."""
        import ray

        return (ray.util.get_node_ip_address(), *free_ports(2))

    def run(self, command: list[str], variables: Mapping[str, str], folder: str) -> tuple[int, str]:
        """Runs the worker; returns its exit code, and the error that ended it, as Python shows it, or ""."""
        with tempfile.TemporaryDirectory(prefix="trainingcompiler-") as private:
            path = Path(private) / "failure"
            environment = {**os.environ, **variables, FAILURE: str(path)}
            self._process = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True)
            if self._stopped.is_set():
                self.stop()
            code = self._process.wait()
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)  # whatever it has left behind
            return code, path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def stop(self) -> None:
        """Ends the worker: it is asked first, then killed."""
        self._stopped.set()
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(_KILL_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()


def _run(ray: Any, job: Job, count: int, received: list[int]) -> tuple[int, str, str]:
    group = _place(ray, job, received)
    if group is None:
        return exit_code(-received[0]), "", ""
    strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
    workers = job.nproc_per_node or 1
    actor = ray.remote(num_cpus=1, num_gpus=job.gpus_per_node / workers, max_concurrency=2)(Host)
    hosts = [
        actor.options(scheduling_strategy=strategy(group, placement_group_bundle_index=rank // workers)).remote()
        for rank in range(count)
    ]
    try:
        host, port, coordinator = ray.get(hosts[0].address.remote())
        shared = {**job.variables, "MASTER_ADDR": host, "MASTER_PORT": str(port), COORDINATOR: f"{host}:{coordinator}"}
        ranks = {
            hosts[rank].run.remote(job.command, {**shared, **_ranks(job, rank)}, os.getcwd()): rank
            for rank in range(count)
        }
        code, report, error = _watch(ray, ranks, received)
        if received:
            _stop(ray, hosts)
            code = _requeued(ray, list(ranks)) or code
        return code, report, error
    finally:
        _stop(ray, hosts)
        ray.util.remove_placement_group(group)


def _stop(ray: Any, hosts: list[Any]) -> None:
    ray.wait([host.stop.remote() for host in hosts], num_returns=len(hosts), timeout=_KILL_GRACE_S + 5)


def _requeued(ray: Any, runs: list[Any]) -> int:
    """`REQUEUE` where a worker that was told to end has left with it, or 0."""
    ended, _ = ray.wait(runs, num_returns=len(runs), timeout=_POLL_S)
    with contextlib.suppress(ray.exceptions.RayError):
        return REQUEUE if any(code == REQUEUE for code, _ in ray.get(ended)) else 0
    return 0


def _watch(ray: Any, ranks: Mapping[Any, int], received: list[int]) -> tuple[int, str, str]:
    """Waits for all, or for the first that fails; returns the exit code, what to say of it, and its error."""
    waiting, requeued = list(ranks), False
    while waiting:
        some, waiting = ray.wait(waiting, timeout=_POLL_S)
        if received:
            return exit_code(-received[0]), "", ""
        if not some:
            continue
        (ended,) = some
        rank = ranks[ended]
        try:
            code, error = ray.get(ended)
        except ray.exceptions.RayError as lost:  # its host went away
            return 1, f"rank {rank} was lost first: {str(lost).splitlines()[0]}", ""
        requeued |= code == REQUEUE
        if code not in (0, REQUEUE):
            told = f"rank {rank} failed first ({described(code)}):"
            if not error:
                told = f"rank {rank} failed first: {described(code)}; it left no traceback, what it said is above"
            return exit_code(code), told, error
    return (REQUEUE if requeued else 0), "", ""


def _place(ray: Any, job: Job, received: list[int]) -> Any:
    """The group of places for the workers; None where this process is told to end before there is one."""
    group = ray.util.placement_group(
        [_bundle(job)] * job.max_nodes, strategy="STRICT_SPREAD" if job.max_nodes > 1 else "STRICT_PACK"
    )
    deadline_s = time.monotonic() + PLACEMENT_TIMEOUT_S
    while not (placed := group.wait(1)) and not received and time.monotonic() < deadline_s:
        pass
    if received:
        ray.util.remove_placement_group(group)
        return None
    if not placed:
        has = {name: amount for name, amount in ray.cluster_resources().items() if name in ("CPU", "GPU")}
        ray.util.remove_placement_group(group)
        raise UsageError(
            f"Ray found no room in {PLACEMENT_TIMEOUT_S:g} s for {job.max_nodes} hosts with {_bundle(job)} each; all "
            f"its hosts together have {has}. Ask for less with --nnodes, --nproc-per-node or --gpus-per-node, or wait "
            "for other jobs to end"
        )
    return group


@contextlib.contextmanager
def _cluster(ray: Any, count: int, job: Job) -> Iterator[None]:
    address = os.environ.get("RAY_ADDRESS")
    # Here more workers than processors are fine; Ray would wait for ever.
    own = {} if address else {"num_cpus": max(count, cpu_count()), "include_dashboard": False}
    if not address and job.max_nodes > 1:
        raise UsageError(
            f"--nnodes={job.max_nodes}: set RAY_ADDRESS to a cluster; without it Ray has this machine only"
        )
    try:
        ray.init(address=address or "local", logging_level="warning", **own)
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = f"RAY_ADDRESS={address}" if address else "a cluster on this machine"
        raise UsageError(f"Ray could not begin with {where}: {error}. `ray status` says whether it runs") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _listening() -> Iterator[list[int]]:
    """Yields the signals that have told this process to end; raising from a handler would end up inside of Ray."""
    received: list[int] = []

    def arrived(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, arrived) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _bundle(job: Job) -> dict[str, float]:
    gpus = {"GPU": float(job.gpus_per_node)} if job.gpus_per_node else {}
    return {"CPU": float(job.nproc_per_node or 1), **gpus}


def _ranks(job: Job, rank: int) -> dict[str, str]:
    workers = job.nproc_per_node or 1
    node = str(rank // workers)
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(workers * job.max_nodes),
        "LOCAL_RANK": str(rank % workers),
        "LOCAL_WORLD_SIZE": str(workers),
        "NODE_RANK": node,
        "GROUP_RANK": node,
        "TORCHELASTIC_RUN_ID": job.name,
    }
