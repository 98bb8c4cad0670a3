"""Who started this process, and as which of how many: torchrun's, Slurm's and Open MPI's variables, understood."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from trainingcompiler.errors import UsageError

_PORTS = range(20000, 32000, 2)  # two each: torch's, and the next one for JAX
_PART = re.compile(r"(?P<name>[^\[,]*)(?:\[(?P<numbers>[^\]]*)\](?P<rest>[^,\[]*))?,?")
_TASKS = re.compile(r"(?P<count>\d+)(?:\(x(?P<times>\d+)\))?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Worker:
    """Which of how many processes this is.

    Attributes:
        rank: Of all of them, from 0.
        world_size: How many there are.
        local_rank: Of those on this host, from 0.
        local_world_size: How many are on this host.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


@dataclass(frozen=True, kw_only=True)
class ClusterEnvironment:
    """What one source says.

    Attributes:
        worker: This process.
        source: What a person calls the source, with its values.
        node_rank: Which host this is.
        master: The host of rank 0 and a port of it for torch; None where the source does not say.
    """

    worker: Worker
    source: str
    node_rank: int
    master: tuple[str, int] | None


def read(environ: Mapping[str, str]) -> ClusterEnvironment | None:
    """What the environment says; None for a process that is alone.

    A launcher that sets torch's variables stands between this process and the cluster's, so that its word holds.
    Without one, torch's variables were set by hand, and have to agree with the others.

    Raises:
        UsageError: Values are not numbers, do not fit together, or two sources disagree.
    """
    torchs = _torchs(environ)
    if torchs is not None and "TORCHELASTIC_RUN_ID" in environ:
        return torchs
    found = [one for one in (torchs, _slurms(environ), _mpis(environ)) if one is not None]
    for other in found[1:]:
        if (other.worker.rank, other.worker.world_size) != (found[0].worker.rank, found[0].worker.world_size):
            raise UsageError(
                f"two sources disagree on which worker this is: {found[0].source}, but {other.source}. Unset the "
                "variables of the one that does not hold"
            )
    return found[0] if found else None


def _torchs(environ: Mapping[str, str]) -> ClusterEnvironment | None:
    if not (environ.get("RANK") and environ.get("WORLD_SIZE")):
        return None
    # A pod of a PyTorchJob is one worker, and has no local rank.
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    worker = _worker(environ, names, (None, None, "0", "1" if "LOCAL_RANK" not in environ else None))
    master = None
    if environ.get("MASTER_ADDR") and environ.get("MASTER_PORT"):
        master = environ["MASTER_ADDR"], _number(environ, "MASTER_PORT")
    node = _number(environ, "GROUP_RANK", environ.get("NODE_RANK", str(worker.rank // worker.local_world_size)))
    return ClusterEnvironment(worker=worker, source=_shown(environ, names), node_rank=node, master=master)


def _slurms(environ: Mapping[str, str]) -> ClusterEnvironment | None:
    if not environ.get("SLURM_STEP_NODELIST") or not environ.get("SLURM_PROCID"):
        return None  # a batch script has a rank as well, but is no task of srun
    count = environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS", "1")
    if count == "1":
        return None
    names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NODEID")
    node = _number(environ, "SLURM_NODEID", "0")
    tasks = tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", count))
    local = str(tasks[node]) if node < len(tasks) else count
    filled = {**environ, "SLURM_NTASKS": count, "SLURM_STEP_TASKS_PER_NODE": local}
    worker = _worker(filled, ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"))
    # Steps of one allocation may run side by side: each has its own ports.
    job, step = (int(environ.get(name, "0") or 0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    master = first_host(environ["SLURM_STEP_NODELIST"]), _PORTS[(job * 37 + step) % len(_PORTS)]
    return ClusterEnvironment(worker=worker, source=_shown(filled, names), node_rank=node, master=master)


def _mpis(environ: Mapping[str, str]) -> ClusterEnvironment | None:
    prefix = "OMPI_COMM_WORLD"
    names = tuple(f"{prefix}_{word}" for word in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
    if not environ.get(names[0]) or environ.get(names[1], "1") == "1":
        return None
    worker = _worker(environ, names)
    identity = environ.get("PMIX_NAMESPACE") or environ.get("OMPI_MCA_ess_base_jobid", "")
    port = _PORTS[sum(identity.encode()) % len(_PORTS)]
    host = None
    if worker.local_world_size == worker.world_size:
        host = "127.0.0.1"
    else:  # "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911": where mpirun runs, on the first host
        found = re.search(r"tcp6?://\[?([^,\]:]+)", environ.get("OMPI_MCA_orte_hnp_uri", ""))
        host = found[1] if found else None
    node = _number(environ, f"{prefix}_NODE_RANK", str(worker.rank // worker.local_world_size))
    master = (host, port) if host else None
    return ClusterEnvironment(worker=worker, source=_shown(environ, names), node_rank=node, master=master)


def _worker(
    environ: Mapping[str, str], names: tuple[str, ...], defaults: tuple[str | None, ...] = (None,) * 4
) -> Worker:
    rank, size, local, local_size = (
        _number(environ, name, default) for name, default in zip(names, defaults, strict=True)
    )
    if not (rank < size and local < local_size <= size):
        raise UsageError(f"these do not fit together: {_shown(environ, names)}; ranks begin with 0")
    return Worker(rank=rank, world_size=size, local_rank=local, local_world_size=local_size)


def _number(environ: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = environ.get(name) or default
    if text is None:
        raise UsageError(f"{name} is not set, though others say that this is one of several workers; set it")
    if not text.isdecimal():
        raise UsageError(f"{name}={text}: must be a whole number, 0 or more")
    return int(text)


def _shown(environ: Mapping[str, str], names: tuple[str, ...]) -> str:
    return " ".join(f"{name}={environ[name]}" for name in names if name in environ)


def first_host(nodelist: str) -> str:
    """The first host of a list as Slurm writes it: `"gpu[07-09,12],login"` -> `"gpu07"`."""
    return next(hosts(nodelist))


def hosts(nodelist: str) -> Iterator[str]:
    """All hosts of a list as Slurm writes it."""
    for part in _PART.finditer(nodelist):
        if part["numbers"] is None:
            if part["name"]:
                yield part["name"]
            continue
        for numbers in part["numbers"].split(","):
            least, _, most = numbers.partition("-")
            for number in range(int(least), int(most or least) + 1):
                yield f"{part['name']}{number:0{len(least)}d}{part['rest']}"


def tasks_per_node(text: str) -> list[int]:
    """`"2(x3),1"` -> `[2, 2, 2, 1]`."""
    return [int(found["count"]) for found in _TASKS.finditer(text) for _ in range(int(found["times"] or 1))]
