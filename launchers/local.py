"""Starts workers on this machine: one in place of the launcher itself, or several and looks after them."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from trainingcompiler.cli.job import Job
from trainingcompiler.config import COORDINATOR, FAILURE
from trainingcompiler.errors import UsageError
from trainingcompiler.launchers.messages import shell_line, with_threads
from trainingcompiler.launchers.supervisor import Supervisor
from trainingcompiler.processes.host_resources import free_ports

HOST = "127.0.0.1"


def launch(job: Job) -> NoReturn:
    """Becomes the worker, or, where the job asks for workers, starts them and leaves when they are done.

    Raises:
        UsageError: This process is a worker already, or the platform cannot run several.
    """
    if job.nproc_per_node is None:
        become_worker(job)
    _check_surroundings(job, os.environ)
    variables = with_threads(job.nproc_per_node, os.environ)

    def environments(attempt: int, failure_paths: Mapping[int, Path]) -> list[dict[str, str]]:
        shared = {**os.environ, **job.variables, **variables, **addresses(job, attempt)}
        return [
            {**shared, **rank_variables(rank, len(failure_paths)), FAILURE: str(path)}
            for rank, path in failure_paths.items()
        ]

    if job.dry_run:
        planned = environments(0, dict.fromkeys(range(job.nproc_per_node), Path()))
        sys.stdout.write("".join(shell_line(job.command, environment) for environment in planned))
        sys.exit(0)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(Supervisor(job, environments).run())


def addresses(job: Job, attempt: int) -> dict[str, str]:
    """Where the workers of a host meet, in torch's variables and in ours; the ports are free ones."""
    port, coordinator = free_ports(2)
    host = job.master_addr or HOST
    return {
        "MASTER_ADDR": host,
        "MASTER_PORT": str(job.master_port or port),
        COORDINATOR: f"{host}:{coordinator}",
        "TORCHELASTIC_RESTART_COUNT": str(attempt),
        "TORCHELASTIC_MAX_RESTARTS": str(job.max_restarts),
        "TORCHELASTIC_RUN_ID": job.name,
        "TORCHELASTIC_USE_AGENT_STORE": "False",  # rank 0 serves the store, as there is no agent of torch's
    }


def rank_variables(rank: int, count: int) -> dict[str, str]:
    """Torch's variables of one worker of `count` on one host."""
    ranks = dict.fromkeys(("RANK", "LOCAL_RANK", "ROLE_RANK"), str(rank))
    sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE"), str(count))
    return {**ranks, **sizes, "GROUP_RANK": "0", "NODE_RANK": "0", "GROUP_WORLD_SIZE": "1", "ROLE_NAME": "default"}


def become_worker(job: Job) -> NoReturn:
    """Replaces this process by the one worker, as it is."""
    environment = {**os.environ, **job.variables}
    if job.dry_run:
        sys.stdout.write(shell_line(job.command, environment))
        sys.exit(0)
    sys.stdout.flush()
    sys.stderr.flush()
    if sys.platform == "win32":  # its exec returns to the shell at once, without the exit code
        sys.exit(subprocess.run(job.command, env=environment).returncode)
    # Exec, not a child: the script then owns the process id, the signals, the terminal and the exit code, as it would
    # without a launcher, and nothing is left in between that could fail to pass one on.
    os.execve(sys.executable, job.command, environment)


def _check_surroundings(job: Job, environ: Mapping[str, str]) -> None:
    if sys.platform == "win32":
        raise UsageError("--nproc-per-node: several workers need process groups, which Windows does not have; use WSL")
    if "TORCHELASTIC_RUN_ID" in environ and "RANK" in environ:
        raise UsageError(
            f"--nproc-per-node={job.nproc_per_node}: this process is itself a worker (RANK={environ['RANK']}, "
            f"WORLD_SIZE={environ.get('WORLD_SIZE')}); give the number to whoever starts first, and not here again"
        )
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != "1":
        raise UsageError(
            f"--nproc-per-node={job.nproc_per_node}: this process is one of {tasks} tasks of srun, and each would "
            "start as many workers; leave the option out, then each task is a worker, or start with srun --ntasks=1"
        )
