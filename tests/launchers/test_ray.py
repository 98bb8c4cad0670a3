"""Workers on a Ray cluster: a real one, of this machine, where Ray is installed."""

import signal
import sys
from importlib.util import find_spec

import pytest
from launching import alive, done, interrupt

WORDS = ("--launcher=ray", "--nproc-per-node=2")
LOCAL = {"RAY_ADDRESS": "", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONWARNINGS": "ignore"}
with_ray = pytest.mark.skipif(find_spec("ray") is None, reason='Ray is not installed: pip install "ray>=2.40"')

READY = "pathlib.Path(f'ready-{rank}').touch()\n"


@with_ray
def test_workers_of_ray(launch, tmp_path):
    source = (
        "names = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE')\n"
        "(pathlib.Path(f'met-{rank}')).write_text(' '.join(os.environ[name] for name in names))\n"
    )
    ran = done(launch(source, *WORDS, **LOCAL))
    assert ran.returncode == 0, ran.stderr
    assert [(tmp_path / f"met-{rank}").read_text() for rank in (0, 1)] == ["0 2 0 2", "1 2 1 2"]


@with_ray
def test_a_failure_ends_the_others_and_is_told_last(launch, tmp_path):
    source = READY + "if rank == '1':\n    wait_for('ready-0')\n    raise ValueError('on purpose')\ntime.sleep(600)\n"
    ran = done(launch(source, *WORDS, **LOCAL))
    assert ran.returncode == 1
    told = ran.stderr[ran.stderr.index("[launch]     rank 1 failed first (exit code 1):") :]
    assert told.splitlines()[-1] == "ValueError: on purpose"
    assert not alive(tmp_path)


@with_ray
def test_sigterm_ends_the_workers(launch, tmp_path):
    process = launch(READY + "time.sleep(600)\n", *WORDS, **LOCAL)
    interrupt(process, tmp_path, signal.SIGTERM)
    assert done(process).returncode == 128 + signal.SIGTERM
    assert not alive(tmp_path)


def test_dry_run(launch, tmp_path):
    words = (*WORDS, "--nnodes=2", "--gpus-per-node=8", "--dry-run")
    ran = done(launch("", *words, RAY_ADDRESS="ray://head:10001"))
    lines = ran.stdout.splitlines()
    assert ran.returncode == 0
    assert lines[:2] == ["# cluster: ray://head:10001", "# hosts: 2 x {'CPU': 2.0, 'GPU': 8.0}"]
    assert [" RANK=3 " in line for line in lines[2:]] == [False, False, False, True]
    assert lines[-1].endswith(f"{sys.executable} -m trainingcompiler.worker script train.py")
    assert not (tmp_path / "pids").exists()


def test_without_ray(launch):
    ran = done(launch("", *WORDS, prelude="import sys; sys.modules['ray'] = None"))
    assert ran.returncode == 2
    assert ran.stderr == (
        "trainingcompiler.launch: --launcher=ray needs Ray, which is not installed: pip install "
        '"trainingcompiler[ray]"\n'
    )


@with_ray
def test_several_hosts_need_a_cluster(launch):
    ran = done(launch("", *WORDS, "--nnodes=2", **LOCAL))
    assert ran.returncode == 2
    assert "--nnodes=2: set RAY_ADDRESS to a cluster; without it Ray has this machine only" in ran.stderr
