"""Starts the workers of this host through torch's elastic agent, which is torchrun's."""

import os
import sys
from importlib import import_module
from typing import Any, NoReturn

from trainingcompiler.cli.job import Job
from trainingcompiler.errors import UsageError
from trainingcompiler.launchers.messages import described, exit_code, say, shell_line, with_threads

_PORT, _MEETING_PORT = 29500, 29400  # torchrun's own for --master-addr and --rdzv-endpoint, where no other is given


def launch(job: Job) -> NoReturn:
    """Runs the agent until the workers are done, and leaves with the exit code of the first that failed.

    Raises:
        UsageError: torch is not installed, or the hosts do not meet.
    """
    settings = rendezvous_settings(job)
    if job.dry_run:
        shown = {"nnodes": f"{job.min_nodes}:{job.max_nodes}", "nproc-per-node": job.nproc_per_node, **settings}
        sys.stdout.write("".join(f"# {name}: {value}\n" for name, value in shown.items()))
        sys.stdout.write(shell_line(job.command, {**os.environ, **job.variables}))
        sys.exit(0)
    try:
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.elastic.rendezvous import RendezvousError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    except ImportError as error:
        raise UsageError(
            f"--launcher=elastic is torch's agent, and torch cannot be imported: {error}. Install it, or leave "
            "--nnodes and --rdzv-endpoint out"
        ) from None
    agent = import_module("trainingcompiler.launchers.torchelastic_agent")
    os.environ.update(job.variables)
    os.environ.update(with_threads(job.nproc_per_node or 1, os.environ))
    tee = job.tee if job.tee is not None else (1, 2) if job.log_dir else ()
    redirected = (1, 2) if job.log_dir else tee
    config = LaunchConfig(
        min_nodes=job.min_nodes,
        max_nodes=job.max_nodes,
        nproc_per_node=job.nproc_per_node or 1,
        max_restarts=job.max_restarts,
        logs_specs=DefaultLogsSpecs(
            log_dir=job.log_dir,
            redirects=Std(sum(redirected)),
            tee=Std(sum(tee)),
            local_ranks_filter=set(job.local_ranks_filter) if job.local_ranks_filter is not None else None,
        ),
        **settings,
    )
    program, *arguments = job.command
    try:
        with agent.in_place():
            elastic_launch(config, program)(*arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        say(f"rank {rank} failed first ({described(failure.exitcode)}):")
        sys.stderr.write(_traceback_of(failure.error_file_data) or f"{failure.message}\n")
        sys.exit(exit_code(failure.exitcode))
    except SignalException as received:
        sys.exit(exit_code(-received.sigval))
    except RendezvousError as error:
        place = settings["rdzv_endpoint"]
        raise UsageError(
            f"the hosts did not meet at {place}: {error}. Is one of them {place.rpartition(':')[0]}, is the port free "
            "there and open between them, and do all give the same --rdzv-endpoint, --rdzv-id and --nnodes?"
        ) from error
    sys.exit(0)


def rendezvous_settings(job: Job) -> dict[str, Any]:
    """Where and how hosts meet, in the words of `LaunchConfig`."""
    if not (job.rdzv_endpoint or job.master_addr):
        # As torchrun --standalone: a store of this host's own, on a free port.
        endpoint, backend = f"localhost:{job.master_port or 0}", "c10d"
    elif job.rdzv_endpoint:
        named = job.rdzv_endpoint.rpartition(":")[2].isdecimal()
        endpoint, backend = job.rdzv_endpoint if named else f"{job.rdzv_endpoint}:{_MEETING_PORT}", job.rdzv_backend
    else:
        endpoint, backend = f"{job.master_addr}:{job.master_port or _PORT}", "static"
    configs = {"rank": job.node_rank or 0} if backend == "static" else {}
    return {
        "rdzv_backend": backend,
        "rdzv_endpoint": endpoint,
        "rdzv_configs": configs,
        "run_id": job.rdzv_id or job.name,
    }


def _traceback_of(content: Any) -> str:
    message = content.get("message") if isinstance(content, dict) else None
    return message["extraInfo"].get("py_callstack", "") if isinstance(message, dict) else ""
