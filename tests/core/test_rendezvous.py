"""Workers meet, as processes: whoever started them, JAX's processes know each other before the script begins."""

import os
import re
import socket
import subprocess
import sys

import pytest

from trainingcompiler import config
from trainingcompiler.errors import UsageError
from trainingcompiler.processes import cluster_env, rendezvous
from trainingcompiler.processes.host_resources import free_ports
from trainingcompiler.processes.rendezvous import Worker

GATHER = """
import os
import pathlib
import jax
import numpy as np
from jax.experimental import multihost_utils
from trainingcompiler.processes import rendezvous
from trainingcompiler.reporting import statistics
statistics.current().step_finished("xla", 1.0)
worker = rendezvous.current()
ranks = multihost_utils.process_allgather(np.array([worker.rank])).ravel().tolist()
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK")
met = [worker.rank, ranks, len(jax.local_devices()), [os.environ[name] for name in names]]
pathlib.Path(f"met-{worker.rank}").write_text(str(met))  # on stdout Gloo speaks in between
"""
OURS = {*config.VARIABLES.values(), "JAX_PLATFORMS", "XLA_FLAGS"}
TIMEOUT_S = 120  # only against hanging


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train.py").write_text(GATHER)
    return tmp_path


def start(folder, *words: str, **variables: str) -> subprocess.Popen[str]:
    environ = {name: value for name, value in os.environ.items() if name not in OURS}
    command = [sys.executable, *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        command, cwd=folder, env={**environ, "JAX_PLATFORMS": "cpu", **variables}, text=True, **pipes
    )


def ends(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each; none is left."""
    try:
        said = [process.communicate(timeout=TIMEOUT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]


WORKER = ("-m", "trainingcompiler.launch", "train.py")
EXPECTED = ["[0, [0, 1], 1, ['0', '2', '0', '2', '0']]", "[1, [0, 1], 1, ['1', '2', '1', '2', '0']]"]


def met(folder) -> list[str]:
    return [path.read_text() for path in sorted(folder.glob("met-*"))]


def test_under_our_launcher(folder):
    ((code, _, err),) = ends([start(folder, "-m", "trainingcompiler.launch", "--nproc-per-node=2", "train.py")])
    assert (code, met(folder)) == (0, EXPECTED), err
    assert err.count("[done]") == 1  # by rank 0


def test_under_torchrun(folder):
    pytest.importorskip("torch")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ((code, _, err),) = ends([start(folder, *torchrun, *WORKER)])
    assert (code, met(folder)) == (0, EXPECTED), err


def variables_of(source: str, rank: int) -> dict[str, str]:
    port = 20000 + 2 * (os.getpid() % 5000)
    if source == "torch":
        return {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    if source == "slurm":
        return {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "127.0.0.1",
                "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2",
                "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0"}  # fmt: skip
    prefix = "OMPI_COMM_WORLD_"
    return {f"{prefix}RANK": str(rank), f"{prefix}SIZE": "2", f"{prefix}LOCAL_RANK": str(rank),
            f"{prefix}LOCAL_SIZE": "2", "PMIX_NAMESPACE": f"prterun-{os.getpid()}@1"}  # fmt: skip


@pytest.mark.parametrize("source", ["torch", "slurm", "mpi"])
def test_started_by_others(folder, source):
    ended = ends([start(folder, *WORKER, **variables_of(source, rank)) for rank in (0, 1)])
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert met(folder) == EXPECTED


DDP = """
import pathlib
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
own = torch.Generator().manual_seed(dist.get_rank())
for _ in range(8):
    optimizer.zero_grad()
    model(torch.randn(8, 4, generator=own)).pow(2).mean().backward()
    optimizer.step()
pathlib.Path(f"met-{dist.get_rank()}").write_text(str([p.tolist() for p in model.parameters()]))
dist.destroy_process_group()
"""


def test_ddp_trains_one_model(folder):
    pytest.importorskip("torch")
    (folder / "train.py").write_text(DDP)
    words = ["-m", "trainingcompiler.launch", "--nproc-per-node=2"]
    ((code, _, err),) = ends([start(folder, *words, "train.py")])
    first, second = met(folder)
    assert (code, first) == (0, second), err
    assert "8 steps, " in err and "eager" not in err
    ends([start(folder, *words, "--no-compile", "train.py")])
    plain, _ = met(folder)
    numbers = [[float(number) for number in re.findall(r"-?\d[\d.e-]*", text)] for text in (first, plain)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-5)  # float32, in another order


TURN = """
import os
import pathlib
import sys
import threading
wanted = threading.Lock()
wanted.acquire()


def take_a_turn():
    with wanted:
        pathlib.Path(f"turn-{os.environ['RANK']}").touch()


threading.Thread(target=take_a_turn, daemon=True).start()
sys.setswitchinterval(1000)  # the main thread keeps the interpreter to its end
wanted.release()
"""


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="Python lets such threads hang from 3.14 on")
def test_threads_that_wait_for_the_interpreter_get_it_before_python_ends(folder):
    (folder / "train.py").write_text(TURN)
    ((code, _, err),) = ends([start(folder, *WORKER[:2], "--nproc-per-node=2", "--no-compile", "train.py")])
    assert code == 0, err
    assert {path.name for path in folder.glob("turn-*")} == {"turn-0", "turn-1"}


def test_a_worker_that_fails_does_not_wait_for_the_others(folder):
    (folder / "train.py").write_text(
        "import time\nfrom trainingcompiler.processes import rendezvous\n"
        "if rendezvous.current().rank == 1:\n    raise ValueError('on purpose')\n"
        "time.sleep(600)\n"
    )
    first, second = (start(folder, *WORKER, **variables_of("torch", rank)) for rank in (0, 1))
    try:
        _, err = second.communicate(timeout=TIMEOUT_S)
    finally:
        first.kill()
        first.communicate()
    assert (second.returncode, err.splitlines()[-1]) == (1, "ValueError: on purpose")


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_sigterm_ends_a_worker_as_it_ends_a_script(folder):
    (folder / "train.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\nsignal.pause()\n")
    ended = ends([start(folder, *WORKER, **variables_of("torch", rank)) for rank in (0, 1)])
    assert [code for code, _, _ in ended] == [-15, -15]


def test_different_scripts_are_told_once(folder):
    (folder / "other").mkdir()
    (folder / "other" / "train.py").write_text(GATHER + "# changed\n")
    first = start(folder, *WORKER, **variables_of("torch", 0))
    second = start(folder / "other", *WORKER, **variables_of("torch", 1))
    (code, _, err), (other_code, _, other_err) = ends([first, second])
    assert (code, other_code) == (2, 2)
    assert err.startswith("trainingcompiler: the workers do not run the same, and would not train one model:\n  rank 1")
    assert "script train.py" in err
    assert other_err == ""


def test_bad_flags_for_xla_are_told_before_anything_starts(folder):
    words = ["-m", "trainingcompiler.launch", "--nproc-per-node=2", "train.py"]
    ((code, _, err),) = ends([start(folder, *words, XLA_FLAGS="--xla_cpu_enable_fast_maths=1")])
    assert code == 2
    assert err.count("which the installed XLA does not know (did you mean --xla_cpu_enable_fast_math?)") == 1


def test_alone():
    environ: dict[str, str] = {}
    assert rendezvous.join(environ) is None
    assert environ == {} and rendezvous.current() is None


def test_one_of_one_needs_nobody(monkeypatch):
    monkeypatch.setattr(rendezvous, "_current", None)
    environ = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    worker = Worker(rank=0, world_size=1, local_rank=0, local_world_size=1)
    assert rendezvous.join(dict(environ)) == rendezvous.current() == worker


def test_nobody_says_where_rank_0_is():
    environ = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    with pytest.raises(UsageError) as refused:
        rendezvous.join(environ)
    assert str(refused.value) == (
        "RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2, and nothing says where rank 0 is: set MASTER_ADDR to its "
        "host, and MASTER_PORT to a port of it that is free, as is the next one"
    )


def test_rank_0_is_not_there():
    environ = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    coordinator = {config.COORDINATOR: f"127.0.0.1:{free_ports(1)[0]}"}
    with pytest.raises(UsageError, match=f"rank 1 on {socket.gethostname()} cannot reach rank 0 at 127.0.0.1:"):
        rendezvous.join(environ | coordinator, timeout_s=0.2)


def test_facts_are_of_the_script_and_of_what_is_installed(folder, monkeypatch):
    monkeypatch.chdir(folder)
    found = rendezvous.facts(("script", "train.py"))
    assert {"Python", "jax", "jaxlib", "trainingcompiler"} <= set(found)
    assert len(found["script train.py"]) == 12
    (folder / "train.py").write_text("")
    assert rendezvous.facts(("script", "train.py"))["script train.py"] != found["script train.py"]
    assert rendezvous.facts(("module", "package.train"))["module package.train"] == "without a file"


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs, XLA for them, and a torch that uses them."""
    monkeypatch.setattr(rendezvous, "gpu_count", lambda environ: 2)
    monkeypatch.setattr(rendezvous, "find_spec", lambda name: object())
    monkeypatch.setattr(rendezvous, "_torch_uses_cuda", lambda: True)


def test_gpus_are_shared_with_torch_aloud(gpus, monkeypatch):
    environ: dict[str, str] = {}
    assert rendezvous.share_gpus(environ) == (
        "XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_PYTHON_CLIENT_MEM_FRACTION=.95: PyTorch and XLA share the GPU's "
        "memory, so XLA takes none of it in advance, and more than its usual 75% if it needs it"
    )
    assert environ == {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": ".95"}
    for own in ({"XLA_PYTHON_CLIENT_MEM_FRACTION": ".3"}, {"JAX_PLATFORMS": "cpu"}):
        assert rendezvous.share_gpus(own) == "" and len(own) == 1
    monkeypatch.setattr(rendezvous, "_torch_uses_cuda", lambda: False)
    assert rendezvous.share_gpus({}) == ""


def test_more_workers_than_gpus_on_their_host(gpus):
    environ = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    with pytest.raises(UsageError) as refused:
        rendezvous.join(environ)
    assert str(refused.value).startswith(
        "4 workers on this host, and each sees 2 GPUs: one each is needed. Start fewer"
    )


def test_what_the_other_modules_call_a_worker():
    assert rendezvous.Worker is cluster_env.Worker
