"""Torch's elastic agent as a launcher."""

import signal
import sys

import pytest
from launching import done, interrupt

from trainingcompiler.cli.job import Job
from trainingcompiler.launchers import elastic
from trainingcompiler.processes.host_resources import free_ports

pytest.importorskip("torch.distributed.launcher.api")
WORDS = ("--launcher=elastic", "--nproc-per-node=2")
BEGIN = (
    "names = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'TORCHELASTIC_USE_AGENT_STORE', 'TORCHELASTIC_RESTART_COUNT')\n"
    "(pathlib.Path(f'met-{rank}')).write_text(' '.join(os.environ[name] for name in names))\n"
)


def test_workers_of_torchs_agent(launch, tmp_path):
    ran = done(launch(BEGIN, *WORDS))
    assert ran.returncode == 0, ran.stderr
    assert [(tmp_path / f"met-{rank}").read_text() for rank in (0, 1)] == ["0 2 0 True 0", "1 2 1 True 0"]


def test_a_failure_is_started_again_and_then_told_last(launch):
    source = (
        "if rank == '1':\n    raise ValueError('at ' + os.environ['TORCHELASTIC_RESTART_COUNT'])\ntime.sleep(600)\n"
    )
    ran = done(launch(source, *WORDS, "--max-restarts=1"))
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1] == "ValueError: at 1"
    assert "[launch]     rank 1 failed first (exit code 1):\nTraceback" in ran.stderr


@pytest.mark.parametrize("numbered", [False, True])
def test_two_hosts_meet_at_an_endpoint(numbered, launch, tmp_path):
    (port,) = free_ports(1)
    meeting = ("--launcher=elastic", "--nnodes=2", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=x")
    numbers = [("--rdzv-backend=static", f"--node-rank={rank}") if numbered else () for rank in range(2)]
    hosts = [launch(BEGIN, *meeting, *own) for own in numbers]
    assert [done(host).returncode for host in hosts] == [0, 0]
    assert [(tmp_path / f"met-{rank}").read_text() for rank in (0, 1)] == ["0 2 0 True 0", "1 2 0 True 0"]


def test_dry_run(launch, tmp_path):
    ran = done(launch("", *WORDS, "--nnodes=1:2", "--rdzv-endpoint=a:29400", "--rdzv-id=x", "--dry-run"))
    lines = ran.stdout.splitlines()
    assert ran.returncode == 0
    assert {"# nnodes: 1:2", "# rdzv_backend: c10d", "# rdzv_endpoint: a:29400", "# run_id: x"} <= set(lines)
    assert lines[-1].endswith(f"{sys.executable} -m trainingcompiler.worker script train.py")
    assert not (tmp_path / "pids").exists()


@pytest.mark.parametrize(
    ("given", "endpoint", "backend", "configs"),
    [
        ({}, "localhost:0", "c10d", {}),
        ({"max_nodes": 2, "rdzv_endpoint": "a:1"}, "a:1", "c10d", {}),
        ({"max_nodes": 2, "rdzv_endpoint": "[::1]"}, "[::1]:29400", "c10d", {}),
        ({"max_nodes": 2, "rdzv_endpoint": "a", "rdzv_backend": "static", "node_rank": 1}, "a:29400", "static",
         {"rank": 1}),
        ({"master_addr": "a", "rdzv_backend": "static"}, "a:29500", "static", {"rank": 0}),
        ({"max_nodes": 2, "master_addr": "a", "node_rank": 1, "rdzv_backend": "static"}, "a:29500", "static",
         {"rank": 1}),
    ],
)  # fmt: skip
def test_where_hosts_meet(given, endpoint, backend, configs):
    found = elastic.rendezvous_settings(Job(arguments=("script", "train.py"), nproc_per_node=1, **given))
    assert (found["rdzv_endpoint"], found["rdzv_backend"], found["rdzv_configs"]) == (endpoint, backend, configs)


def test_a_meeting_place_that_is_not_there(launch):
    prelude = (
        "import torch.distributed.launcher.api as api\n"
        "from torch.distributed.elastic.rendezvous import RendezvousConnectionError\n"
        "def fail(*_, **__): raise RendezvousConnectionError('no answer')\n"
        "api.launch_agent = fail"
    )
    ran = done(launch("", *WORDS, "--nnodes=2", "--rdzv-endpoint=nowhere:1", prelude=prelude))
    assert ran.returncode == 2
    assert ran.stderr.splitlines()[-1].startswith(
        "trainingcompiler.launch: the hosts did not meet at nowhere:1: no answer. Is one of them nowhere, is the port"
    )


SAVING = """
def save(*_):
    if rank == '0':
        time.sleep(1)  # torch would end it meanwhile: rank 1 has left
        say('saved')
    sys.exit(75)
"""
READY = "pathlib.Path(f'ready-{rank}').touch()\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_whoever_saves_is_given_time_and_nothing_is_started_again(number, launch, tmp_path):
    source = f"{SAVING}signal.signal({int(number)}, save)\n{READY}time.sleep(600)\n"
    process = launch(source, *WORDS, "--max-restarts=3")
    interrupt(process, tmp_path, number)
    ran = done(process)
    assert (ran.returncode, ran.stdout) == (75, "saved\n"), ran.stderr
    assert "the workers were told to stop, have saved, and are to be started again" in ran.stderr
    assert "failed" not in ran.stderr


def test_those_who_save_by_themselves_leave_so_too(launch):
    ran = done(launch(f"{SAVING}save()", *WORDS, "--max-restarts=3"))
    assert (ran.returncode, ran.stdout) == (75, "saved\n"), ran.stderr


def test_workers_that_a_signal_ends(launch, tmp_path):
    process = launch(f"{READY}time.sleep(600)", *WORDS, "--max-restarts=3")
    interrupt(process, tmp_path, signal.SIGUSR1)
    assert done(process).returncode == 128 + signal.SIGUSR1
