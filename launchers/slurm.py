"""Starts workers with Slurm: as tasks of `srun` inside an allocation, or by handing in a batch job that does.

Options of Slurm's own, such as the partition, are set as `sbatch` reads them: SBATCH_PARTITION, SBATCH_TIMELIMIT,
SBATCH_ACCOUNT, ... https://slurm.schedmd.com/sbatch.html#SECTION_INPUT-ENVIRONMENT-VARIABLES
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from typing import NoReturn

from trainingcompiler.cli.job import Job
from trainingcompiler.errors import UsageError
from trainingcompiler.exit_codes import REQUEUE
from trainingcompiler.launchers.local import become_worker

# What Slurm numbers steps that are no `srun`: the batch script, an interactive shell, the step of external processes.
_NO_TASKS = {"4294967290", "4294967291", "4294967292"}


def launch(job: Job) -> NoReturn:
    """Becomes a task's worker, starts tasks, or hands in a job, by where this process is.

    Raises:
        UsageError: Slurm's commands are not installed here.
    """
    if is_task(os.environ):
        become_worker(job)
    if "SLURM_JOB_ID" in os.environ:
        _start_tasks(job)
    script = batch_script(job)
    if job.dry_run:
        sys.stdout.write(script)
        sys.exit(0)
    _check("sbatch")
    if job.log_dir is not None:
        os.makedirs(job.log_dir, exist_ok=True)
    sys.exit(subprocess.run(["sbatch"], input=script, text=True, check=False).returncode)


def is_task(environ: Mapping[str, str]) -> bool:
    """Whether `srun` has started this process."""
    has_step = bool(environ.get("SLURM_STEP_NODELIST")) and bool(environ.get("SLURM_PROCID"))
    return has_step and environ.get("SLURM_STEP_ID") not in _NO_TASKS


def srun(job: Job) -> list[str]:
    """The command that starts the tasks; one that fails ends the others."""
    options = ["--kill-on-bad-exit=1"]
    if job.max_nodes:
        options.append(f"--nodes={job.max_nodes}")
    if job.nproc_per_node is not None:
        options.append(f"--ntasks-per-node={job.nproc_per_node}")
        if job.max_nodes:
            options.append(f"--ntasks={job.max_nodes * job.nproc_per_node}")
    if job.gpus_per_node:
        options.append(f"--gpus-per-node={job.gpus_per_node}")
    if job.log_dir is not None:
        options.append(f"--output={os.path.join(job.log_dir, '%x-%j-%t.out')}")
    return ["srun", *options, *job.command]


def batch_script(job: Job) -> str:
    """The script for `sbatch`; a job whose workers ask to be queued again is."""
    asks = {
        "job-name": job.name,
        "nodes": job.max_nodes or 1,
        "ntasks-per-node": job.nproc_per_node or 1,
        "gpus-per-node": job.gpus_per_node or None,
        "output": os.path.join(job.log_dir, "%x-%j.out") if job.log_dir is not None else None,
    }
    lines = ["#!/bin/bash", *(f"#SBATCH --{name}={value}" for name, value in asks.items() if value is not None)]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in _variables(job).items()]
    lines += [
        "",
        shlex.join(srun(job)),
        "code=$?",
        f"# {REQUEUE}: a worker was told to stop, has saved, and wants to go on later.",
        f'if [ "$code" -eq {REQUEUE} ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
        'exit "$code"',
    ]
    return "\n".join(lines) + "\n"


def _start_tasks(job: Job) -> NoReturn:
    command = srun(job)
    if job.dry_run:
        words = [f"{name}={shlex.quote(value)}" for name, value in _variables(job).items()]
        sys.stdout.write(" ".join([*words, shlex.join(command)]) + "\n")
        sys.exit(0)
    _check("srun")
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvpe("srun", command, {**os.environ, **_variables(job)})


def _variables(job: Job) -> dict[str, str]:
    port = {} if job.master_port is None else {"MASTER_PORT": str(job.master_port)}
    return {**job.variables, **port}


def _check(program: str) -> None:
    if shutil.which(program) is None:
        raise UsageError(
            f"--launcher=slurm needs {program}, which is not on the PATH: start it on a login node of the cluster, or "
            "print what would be handed in, with --dry-run"
        )
