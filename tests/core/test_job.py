"""Torchrun's words on the launcher's command line: what they ask for, and every mistake in them at once."""

import socket

import pytest

from trainingcompiler import launch
from trainingcompiler.cli import job
from trainingcompiler.cli.job import Job
from trainingcompiler.cli.parser import parse
from trainingcompiler.errors import ConfigError

CPU = {"JAX_PLATFORMS": "cpu"}


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A host with three processors and no GPU."""
    monkeypatch.setattr(job, "cpu_count", lambda: 3)
    monkeypatch.setattr(job, "gpu_count", lambda environ: 0)


def asked(*words: str, **environ: str) -> Job:
    line = parse([*words, "train.py"], launch.LAUNCH)
    return job.job_of(line, ["script", "train.py"], {"A": "1"}, environ)


def mistakes(*words: str, **environ: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as refused:
        asked(*words, **environ)
    return refused.value.mistakes


def launcher(*words: str) -> str:
    return job.launcher_of(parse([*words, "train.py"], launch.LAUNCH))


def test_without_options_one_process_is_asked_for():
    assert asked() == Job(arguments=("script", "train.py"), variables={"A": "1"})
    assert asked().nproc_per_node is None


def test_torchruns_words_with_either_separator():
    words = "--nproc_per_node=2 --nnodes 1:2 --rdzv_backend=c10d --rdzv-endpoint=a:29400 --rdzv_id=x --max_restarts=3"
    found = asked(*words.split(), "--log_dir=logs", "--tee=1", "--local_ranks_filter=0,1", "--dry_run")
    assert found == Job(
        arguments=("script", "train.py"), variables={"A": "1"}, nproc_per_node=2, min_nodes=1, max_nodes=2,
        rdzv_backend="c10d", rdzv_endpoint="a:29400", rdzv_id="x", max_restarts=3, log_dir="logs",
        tee=frozenset({1}), local_ranks_filter=frozenset({0, 1}), dry_run=True,
    )  # fmt: skip


def test_how_many_workers(monkeypatch):
    assert asked("--standalone").nproc_per_node == 1
    assert asked("--nproc-per-node=cpu").nproc_per_node == 3
    assert asked("--nproc-per-node=auto").nproc_per_node == 3
    assert asked("--nproc-per-node=16").nproc_per_node == 16  # more than processors
    monkeypatch.setattr(job, "gpu_count", lambda environ: 2)
    assert asked("--nproc-per-node=auto").nproc_per_node == 2
    assert asked("--nproc-per-node=gpu").nproc_per_node == 2
    assert asked("--nproc-per-node=cpu").nproc_per_node == 3
    assert asked("--nproc-per-node=4", **CPU).nproc_per_node == 4


def test_who_starts_the_workers():
    assert launcher() == launcher("--nproc-per-node=2") == launcher("--nnodes=1", "--standalone") == "local"
    assert launcher("--nnodes=2") == launcher("--rdzv-endpoint=a:1") == "elastic"
    assert launcher("--nnodes=2", "--launcher=slurm") == "slurm"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nproc-per-node=gpu"], "--nproc-per-node=gpu: no GPU is visible here (nvidia-smi lists them); for the CPU "
         "give a number"),
        (["--nproc-per-node=gpus"], "--nproc-per-node=gpus: must be a number, 1 or more, or one of auto, gpu, cpu; did "
         "you mean gpu?"),
        (["--nproc-per-node=0"], "--nproc-per-node=0: must be a whole number, 1 or more"),
        (["--nnodes=3:2"], "--nnodes=3:2: must be a number of hosts, 1 or more, or MIN:MAX"),
        (["--nnodes=2"], "--nnodes=2: nothing says where the hosts meet; give each the same --rdzv-endpoint=HOST:PORT, "
         "HOST being one of them (or --master-addr and, on each another, --node-rank)"),
        (["--nnodes=1:2", "--master-addr=a", "--node-rank=0"], "--nnodes=1:2: hosts come and go at an --rdzv-endpoint "
         "with --rdzv-backend=c10d, and not at a --master-addr or with --rdzv-backend=static"),
        (["--nnodes=2", "--master-addr=a"], "--master-addr=a: the hosts are not numbered there; give each another "
         "--node-rank, the first one 0"),
        (["--nnodes=2", "--rdzv-endpoint=a", "--rdzv-backend=static"], "--rdzv-backend=static: the hosts are not "
         "numbered there; give each another --node-rank, the first one 0"),
        (["--nnodes=2", "--rdzv-endpoint=a", "--node-rank=1"], "--node-rank=1: with --rdzv-backend=c10d the hosts are "
         "numbered when they meet, and it would be ignored; leave it out, or give --rdzv-backend=static, which needs "
         "it on each host"),
        (["--nnodes=2", "--rdzv-endpoint=a", "--master-port=4711"], "--master-port=4711: --rdzv-endpoint=a says where "
         "the hosts meet; give one of the two"),
        (["--nnodes=2", "--master-addr=a", "--rdzv-backend=c10d"], "--master-addr=a: with --rdzv-backend=c10d the "
         "hosts meet at --rdzv-endpoint=HOST:PORT; give that one, or leave --rdzv-backend out"),
        (["--rdzv-backend=etcd"], "--rdzv-backend=etcd: nothing says where the hosts meet; give each the same "
         "--rdzv-endpoint=HOST:PORT, HOST being one of them (or --master-addr and, on each another, --node-rank)"),
        (["--launcher=elastic", "--node-rank=1"], "--node-rank=1: --nnodes says that there is one host, whose rank is "
         "0"),
        (["--nnodes=2", "--launcher=local"], "--nnodes=2: --launcher=local starts the workers of one host; give "
         "--launcher=elastic, slurm, ray or kubernetes, or none"),
        (["--node-rank=1"], "--node-rank=1: --nnodes says that there is one host, whose rank is 0"),
        (["--nnodes=2", "--master-addr=a", "--node-rank=2"], "--node-rank=2: there are 2 hosts, whose ranks begin "
         "with 0"),
        (["--rdzv-endpoint=a:b"], "--rdzv-endpoint=a:b: must be HOST:PORT, the same on each host (the port may be left "
         "out: 29400)"),
        (["--rdzv-endpoint=a", "--rdzv-backend=c10"], "--rdzv-backend=c10: must be one of c10d, static, etcd, etcd-v2; "
         "did you mean c10d?"),
        (["--standalone", "--nnodes=2", "--launcher=elastic"], "--standalone is one host: leave it out, or --nnodes "
         "and --rdzv-endpoint"),
        (["--master-port=65536"], "--master-port=65536: must be a whole number, 1 or more, and at most 65535"),
        (["--max-restarts=-1"], "--max-restarts=-1: must be a whole number, 0 or more"),
        (["--tee=4"], "--tee=4: must be 0 (none), 1 (stdout), 2 (stderr) or 3 (both)"),
        (["--local-ranks-filter=2", "--nproc-per-node=2"], "--local-ranks-filter=2: must be ranks of this host, 0 to "
         "1, with commas"),
        (["--exit-timeout=soon"], "--exit-timeout=soon: must be a number of seconds, 0 or more (0 is without limit)"),
        (["--log-dir="], "--log-dir=: must not be empty"),
        (["--launcher=slurm", "--tee=1"], "--tee does not go with --launcher=slurm; those that take it: local, "
         "elastic"),
        (["--launcher=slurm", "--nproc-per-node=gpu"], "--nproc-per-node=gpu: give a number: --launcher=slurm starts "
         "workers on other hosts"),
        (["--launcher=slurm", "--nnodes=1:2"], "--nnodes=1:2: hosts come and go with --launcher=elastic only; "
         "--launcher=slurm takes N"),
        (["--launcher=kubernetes"], "--launcher=kubernetes needs --image=IMAGE, a container image with the script and "
         "this package"),
    ],
)  # fmt: skip
def test_mistakes(words, said):
    assert mistakes(*words) == (said,)


def test_mistakes_are_told_together():
    found = mistakes("--tee=x", "--nnodes=0", "--max-restarts=many", "--launcher=locl")
    assert len(found) == 4


def test_more_workers_than_gpus(monkeypatch):
    monkeypatch.setattr(job, "gpu_count", lambda environ: 2)
    assert mistakes("--nproc-per-node=4") == (
        "--nproc-per-node=4: there are 2 GPUs, and each worker needs one; give at most 2, or set JAX_PLATFORMS=cpu and "
        "CUDA_VISIBLE_DEVICES= to train on the CPU",
    )


def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        (said,) = mistakes(f"--master-port={port}")
    assert said.startswith(f"--master-port={port}: somebody listens on this port already; give another one, or none")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--devices=2", "--nproc-per-node=2"], "--devices=2 is for a script that knows of one process, and "
         "--nproc-per-node for one that is written for several"),
        (["--strategy=fsdp"], "--strategy=fsdp says how several devices share a training, and there is one: give "
         "--devices=all, or --nproc-per-node=N"),
        (["--batch-size=max", "--nproc-per-node=2"], "--batch-size plans a script of one process; it does not go with"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text("")
    with pytest.raises(SystemExit) as leaving:
        launch.main([*words, "train.py"])
    assert leaving.value.code == 2
    assert capsys.readouterr().err.startswith(f"trainingcompiler.launch: {said}")


def test_options_that_scripts_have_too_are_theirs_after_the_script():
    words = ["train.py", "--dry-run", "--log-dir", "x"]
    assert parse(words, launch.LAUNCH).arguments == words[1:]


def test_a_name_is_found():
    assert asked("--rdzv-id=x").name == "x"
    assert asked().name == "train"
