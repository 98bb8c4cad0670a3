"""What a launcher is asked to start: the words of torchrun on our command line, understood and checked."""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from trainingcompiler.cli.parser import CommandLine, Option
from trainingcompiler.config import did_you_mean
from trainingcompiler.errors import ConfigError
from trainingcompiler.processes.host_resources import cpu_count, gpu_count, is_free

WORKER = "trainingcompiler.worker"
DEFAULT_EXIT_TIMEOUT_S = 300.0

OPTIONS = {
    "--nproc-per-node": Option("N|auto|gpu|cpu", "how many workers to start on each host"),
    "--nnodes": Option("N|MIN:MAX", "how many hosts take part; more than one are started on each, or by a cluster"),
    "--node-rank": Option("K", "which of the hosts this is, from 0; for --master-addr and --rdzv-backend=static"),
    "--rdzv-backend": Option("c10d|static|etcd|etcd-v2", "how hosts find each other"),
    "--rdzv-endpoint": Option("HOST:PORT", "where they meet, the same on each host"),
    "--rdzv-id": Option("NAME", "the name of the job, the same on each host"),
    "--standalone": Option("", "one host, and nothing to agree on: what is done without an endpoint anyway"),
    "--master-addr": Option("HOST", "the host of rank 0"),
    "--master-port": Option("PORT", "a free port of that host; without it one is found"),
    "--max-restarts": Option("K", "how often a group of workers of which one failed is started again"),
    "--log-dir": Option("FOLDER", "write each worker's output there"),
    "--tee": Option("0|1|2|3", "show lines with their rank in front: none, stdout, stderr, or both"),
    "--local-ranks-filter": Option("0,1,...", "show the output of these workers only"),
    "--exit-timeout": Option("SECONDS", "how long workers may go on after one has finished; 0 is without limit"),
    "--gpus-per-node": Option("N", "how many GPUs to ask a cluster for, on each host"),
    "--image": Option("IMAGE", "the container image, for Kubernetes"),
    "--dry-run": Option("", "print what would be started, and start nothing"),
    "--launcher": Option("local|elastic|slurm|ray|kubernetes", "who starts the workers"),
}
"""Options of the launcher that say where workers run."""

_TAKEN = {
    "local": "nproc-per-node nnodes node-rank rdzv-id standalone master-addr master-port max-restarts log-dir tee "
    "local-ranks-filter exit-timeout",
    "elastic": "nproc-per-node nnodes node-rank rdzv-backend rdzv-endpoint rdzv-id standalone master-addr master-port "
    "max-restarts log-dir tee local-ranks-filter",
    "slurm": "nproc-per-node nnodes rdzv-id master-port log-dir gpus-per-node",
    "ray": "nproc-per-node nnodes rdzv-id gpus-per-node",
    "kubernetes": "nproc-per-node nnodes rdzv-id master-port max-restarts gpus-per-node image",
}
_BACKENDS = ("c10d", "static", "etcd", "etcd-v2")
_EVERYWHERE = {"--launcher", "--dry-run"}
LAUNCHERS = tuple(_TAKEN)
# The interpreter's short options without a value may share a word with the -m that ends them, as in `python -um x`.
_MODULE_OPTION = re.compile(r"-(?P<others>[bBdEiIOPqsSuvx]*)m")
_ENDPOINT = re.compile(r"(?P<host>\[[^\]]+\]|[^:\s]+)(?::(?P<port>\d+))?")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One script, and where how many workers run it.

    Attributes:
        arguments: The worker's own: "script" or "module", its name, the script's arguments.
        variables: For each worker's environment.
        nproc_per_node: Workers on each host; None where no option asks for several processes.
        min_nodes: The least number of hosts; 0 where nobody said and Slurm's allocation may.
        max_nodes: The largest; the same, unless hosts may come and go.
        node_rank: Which of the hosts this is; None where that is found out.
        rdzv_backend: How hosts find each other.
        rdzv_endpoint: Where, as "host:port"; "" where there is nothing to find.
        rdzv_id: The job's name.
        standalone: One host, and `rdzv_endpoint` is not used.
        master_addr: The host of rank 0; None where the launcher knows.
        master_port: Its port for torch; None is a free one.
        max_restarts: How often the group is started again after a failure.
        log_dir: Folder for the workers' output; None is none.
        tee: The streams shown with the rank in front, 1 and 2; None where nobody said.
        local_ranks_filter: Local ranks whose output is shown; None is all.
        exit_timeout_s: Seconds that workers may go on after one has finished; 0 is without limit.
        gpus_per_node: GPUs to ask a cluster for, on each host.
        image: The container image, for Kubernetes.
        dry_run: Only print.
    """

    arguments: tuple[str, ...]
    variables: Mapping[str, str] = field(default_factory=dict)
    nproc_per_node: int | None = None
    min_nodes: int = 1
    max_nodes: int = 1
    node_rank: int | None = None
    rdzv_backend: str = "c10d"
    rdzv_endpoint: str = ""
    rdzv_id: str = ""
    standalone: bool = False
    master_addr: str | None = None
    master_port: int | None = None
    max_restarts: int = 0
    log_dir: str | None = None
    tee: frozenset[int] | None = None
    local_ranks_filter: frozenset[int] | None = None
    exit_timeout_s: float = DEFAULT_EXIT_TIMEOUT_S
    gpus_per_node: int = 0
    image: str = ""
    dry_run: bool = False

    @property
    def command(self) -> list[str]:
        """The command of each worker."""
        return [sys.executable, *interpreter_options(sys.orig_argv), "-m", WORKER, *self.arguments]

    @property
    def name(self) -> str:
        """What to call the job where a name is needed: the one given, or the script's."""
        script = os.path.splitext(os.path.basename(self.arguments[1]))[0] if len(self.arguments) > 1 else ""
        return self.rdzv_id or script or "training"


def interpreter_options(original: Sequence[str]) -> list[str]:
    """Returns the options `python` itself was given (`-u`, `-W error`, ...) in `original`, a `sys.orig_argv`."""
    options: list[str] = []
    for argument in original[1:]:
        found = _MODULE_OPTION.match(argument)
        if found:
            return [*options, *([f"-{found['others']}"] if found["others"] else [])]
        options.append(argument)
    return []


def is_distributed(line: CommandLine) -> bool:
    """Whether an option asks for workers, and not for the script in one process."""
    return any(name in OPTIONS and name not in _EVERYWHERE for name in line.given)


def launcher_of(line: CommandLine) -> str:
    """The launcher's name: the one given; without it, torch's agent where hosts have to meet, or this host's own."""
    given = line.given.get("--launcher")
    if given is not None:
        return given
    several = line.given.get("--nnodes", "1") not in ("1", "1:1")
    meets = several or {"--rdzv-endpoint", "--rdzv-backend"} & set(line.given)
    return "elastic" if meets and "--standalone" not in line.given else "local"


def job_of(
    line: CommandLine, arguments: Sequence[str], variables: Mapping[str, str], environ: Mapping[str, str]
) -> Job:
    """What the command line asks a launcher for.

    Args:
        line: The command line.
        arguments: The worker's own.
        variables: For the workers' environment.
        environ: The environment of this process, and of the workers.

    Raises:
        ConfigError: Values are wrong, do not go together, or ask for what this host does not have; all of them.
    """
    reader = _Reader(line.given)
    launcher = reader.launcher(launcher_of(line))
    min_nodes, max_nodes = reader.nodes(launcher)
    workers = reader.workers(launcher, environ, is_distributed(line))
    backend = reader.backend()
    job = Job(
        arguments=tuple(arguments),
        variables=dict(variables),
        nproc_per_node=workers,
        min_nodes=min_nodes,
        max_nodes=max_nodes,
        node_rank=reader.number("--node-rank", least=0),
        rdzv_backend=backend,
        rdzv_endpoint=reader.endpoint(),
        rdzv_id=reader.text("--rdzv-id"),
        standalone="--standalone" in line.given,
        master_addr=reader.text("--master-addr") or None,
        master_port=reader.number("--master-port", least=1, most=65535),
        max_restarts=reader.number("--max-restarts", least=0) or 0,
        log_dir=reader.text("--log-dir") or None,
        tee=reader.streams(),
        local_ranks_filter=reader.ranks(workers),
        exit_timeout_s=reader.seconds("--exit-timeout", DEFAULT_EXIT_TIMEOUT_S),
        gpus_per_node=reader.number("--gpus-per-node", least=1) or 0,
        image=reader.text("--image"),
        dry_run="--dry-run" in line.given,
    )
    reader.mistakes += _contradictions(job, launcher)
    if reader.mistakes:
        raise ConfigError(reader.mistakes)
    return job


class _Reader:
    """Reads values, and keeps what is wrong with them for the end."""

    def __init__(self, given: Mapping[str, str]) -> None:
        self._given = given
        self.mistakes: list[str] = []

    def _wrong(self, name: str, must: str) -> None:
        self.mistakes.append(f"{name}={self._given[name]}: {must}")

    def launcher(self, name: str) -> str:
        if name not in _TAKEN:
            self._wrong("--launcher", f"must be one of {', '.join(_TAKEN)}{did_you_mean(name, _TAKEN)}")
            return "local"
        taken = {f"--{word}" for word in _TAKEN[name].split()} | _EVERYWHERE
        for given in self._given:
            if given in OPTIONS and given not in taken:
                others = [other for other, words in _TAKEN.items() if given[2:] in words.split()]
                self.mistakes.append(
                    f"{given} does not go with --launcher={name}; those that take it: {', '.join(others)}"
                )
        return name

    def text(self, name: str) -> str:
        value = self._given.get(name, "")
        if name in self._given and not value:
            self._wrong(name, "must not be empty")
        return value

    def number(self, name: str, least: int, most: int | None = None) -> int | None:
        value = self._given.get(name)
        if value is None:
            return None
        if value.isdecimal() and least <= int(value) and (most is None or int(value) <= most):
            return int(value)
        self._wrong(name, f"must be a whole number, {least} or more" + (f", and at most {most}" if most else ""))
        return None

    def seconds(self, name: str, default: float) -> float:
        try:
            value = float(self._given.get(name, default))
        except ValueError:
            value = -1.0
        if 0 <= value < float("inf"):
            return value
        self._wrong(name, "must be a number of seconds, 0 or more (0 is without limit)")
        return default

    def nodes(self, launcher: str) -> tuple[int, int]:
        if "--nnodes" not in self._given and launcher == "slurm":
            return 0, 0
        value = self._given.get("--nnodes", "1")
        least, _, most = value.partition(":")
        most = most if ":" in value else least
        if not (least.isdecimal() and most.isdecimal() and 1 <= int(least) <= int(most)):
            self._wrong("--nnodes", "must be a number of hosts, 1 or more, or MIN:MAX")
            return 1, 1
        if least != most and launcher != "elastic":
            self._wrong("--nnodes", f"hosts come and go with --launcher=elastic only; --launcher={launcher} takes N")
        return int(least), int(most)

    def workers(self, launcher: str, environ: Mapping[str, str], is_distributed: bool) -> int | None:
        value = self._given.get("--nproc-per-node")
        if value is None:
            return 1 if launcher not in ("local", "slurm") or (is_distributed and launcher == "local") else None
        if value not in ("auto", "gpu", "cpu"):
            count = self.number("--nproc-per-node", least=1) if value.isdecimal() else None
            if count is None and not value.isdecimal():
                self._wrong("--nproc-per-node", f"must be a number, 1 or more, or one of {_choices(value)}")
            elif count is not None and launcher in ("local", "elastic"):
                self._check_gpus(count, environ)
            return count or 1
        if launcher not in ("local", "elastic"):
            self._wrong("--nproc-per-node", f"give a number: --launcher={launcher} starts workers on other hosts")
            return 1
        gpus = 0 if value == "cpu" else gpu_count(environ)
        if value == "gpu" and not gpus:
            self._wrong("--nproc-per-node", "no GPU is visible here (nvidia-smi lists them); for the CPU give a number")
        return gpus or cpu_count()

    def _check_gpus(self, count: int, environ: Mapping[str, str]) -> None:
        if environ.get("JAX_PLATFORMS") == "cpu":
            return
        gpus = gpu_count(environ)
        if 0 < gpus < count:
            self._wrong(
                "--nproc-per-node",
                f"there are {gpus} GPUs, and each worker needs one; give at most {gpus}, or set JAX_PLATFORMS=cpu and "
                "CUDA_VISIBLE_DEVICES= to train on the CPU",
            )

    def backend(self) -> str:
        value = self._given.get("--rdzv-backend", "static" if "--master-addr" in self._given else "c10d")
        if value not in _BACKENDS:
            self._wrong("--rdzv-backend", f"must be one of {', '.join(_BACKENDS)}{did_you_mean(value, _BACKENDS)}")
        return value

    def endpoint(self) -> str:
        value = self._given.get("--rdzv-endpoint", "")
        found = _ENDPOINT.fullmatch(value)
        if "--rdzv-endpoint" in self._given and (found is None or int(found["port"] or 1) > 65535):
            self._wrong("--rdzv-endpoint", "must be HOST:PORT, the same on each host (the port may be left out: 29400)")
        return value

    def streams(self) -> frozenset[int] | None:
        value = self._given.get("--tee")
        if value is None:
            return None
        if value not in ("0", "1", "2", "3"):
            self._wrong("--tee", "must be 0 (none), 1 (stdout), 2 (stderr) or 3 (both)")
            return None
        return frozenset(stream for stream in (1, 2) if int(value) & stream)

    def ranks(self, workers: int | None) -> frozenset[int] | None:
        value = self._given.get("--local-ranks-filter")
        if value is None:
            return None
        words = [word.strip() for word in value.split(",")]
        if not all(word.isdecimal() and int(word) < (workers or 1) for word in words):
            self._wrong("--local-ranks-filter", f"must be ranks of this host, 0 to {(workers or 1) - 1}, with commas")
            return None
        return frozenset(map(int, words))


def _choices(value: str) -> str:
    choices = ("auto", "gpu", "cpu")
    return f"{', '.join(choices)}{did_you_mean(value, choices)}"


def _contradictions(job: Job, launcher: str) -> list[str]:
    found = []
    if job.standalone and (job.max_nodes > 1 or job.rdzv_endpoint):
        found.append("--standalone is one host: leave it out, or --nnodes and --rdzv-endpoint")
    if launcher == "local":
        if job.max_nodes > 1:
            found.append(
                f"--nnodes={job.max_nodes}: --launcher=local starts the workers of one host; give --launcher=elastic, "
                "slurm, ray or kubernetes, or none"
            )
        if job.master_port is not None and not job.dry_run and not is_free(job.master_port):
            found.append(
                f"--master-port={job.master_port}: somebody listens on this port already; give another one, or none: "
                "then a free one is found"
            )
    if launcher == "elastic":
        found += _contradictions_of_meeting(job)
    if job.node_rank and job.max_nodes == 1:
        found.append(f"--node-rank={job.node_rank}: --nnodes says that there is one host, whose rank is 0")
    elif job.node_rank is not None and job.node_rank >= job.max_nodes > 1:
        found.append(f"--node-rank={job.node_rank}: there are {job.max_nodes} hosts, whose ranks begin with 0")
    if launcher == "kubernetes" and not job.image:
        found.append("--launcher=kubernetes needs --image=IMAGE, a container image with the script and this package")
    return found


def _contradictions_of_place(job: Job, counted: bool) -> list[str]:
    """What is wrong with where several hosts are to meet; `counted`: whether each is told its number."""
    if not (job.rdzv_endpoint or job.master_addr) and (job.max_nodes > 1 or job.rdzv_backend != "c10d"):
        what = f"--nnodes={job.max_nodes}" if job.max_nodes > 1 else f"--rdzv-backend={job.rdzv_backend}"
        return [
            f"{what}: nothing says where the hosts meet; give each the same --rdzv-endpoint=HOST:PORT, HOST being one "
            "of them (or --master-addr and, on each another, --node-rank)"
        ]
    if counted and job.min_nodes != job.max_nodes:
        return [
            f"--nnodes={job.min_nodes}:{job.max_nodes}: hosts come and go at an --rdzv-endpoint with "
            "--rdzv-backend=c10d, and not at a --master-addr or with --rdzv-backend=static"
        ]
    if counted and job.max_nodes > 1 and job.node_rank is None:
        place = f"--master-addr={job.master_addr}" if job.master_addr else "--rdzv-backend=static"
        return [f"{place}: the hosts are not numbered there; give each another --node-rank, the first one 0"]
    return []


def _contradictions_of_meeting(job: Job) -> list[str]:
    """What keeps hosts from meeting, or would be ignored: "static" counts on what it is told, others find it out."""
    found = []
    counted = job.rdzv_backend == "static"
    if job.rdzv_endpoint and (job.master_addr or job.master_port):
        given = f"--master-addr={job.master_addr}" if job.master_addr else f"--master-port={job.master_port}"
        found.append(f"{given}: --rdzv-endpoint={job.rdzv_endpoint} says where the hosts meet; give one of the two")
    elif job.master_addr and not counted:
        found.append(
            f"--master-addr={job.master_addr}: with --rdzv-backend={job.rdzv_backend} the hosts meet at "
            "--rdzv-endpoint=HOST:PORT; give that one, or leave --rdzv-backend out"
        )
    elif not job.standalone:
        found += _contradictions_of_place(job, counted)
    if job.node_rank is not None and not counted and job.rdzv_endpoint:
        found.append(
            f"--node-rank={job.node_rank}: with --rdzv-backend={job.rdzv_backend} the hosts are numbered when they "
            "meet, and it would be ignored; leave it out, or give --rdzv-backend=static, which needs it on each host"
        )
    return found
