"""Workers that Slurm starts: on a real cluster of one host where Slurm is installed."""

import os
import subprocess
import sys

import pytest
import slurm_cluster
from launching import done, wait_for

from trainingcompiler.cli.job import Job
from trainingcompiler.launchers import slurm

MET = (
    "names = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE', 'NODE_RANK')\n"
    "(pathlib.Path(f'met-{rank}')).write_text(' '.join(os.environ[name] for name in names))\n"
)


def test_the_batch_script(tmp_path):
    job = Job(
        arguments=("script", "train.py", "--name", "a b"), variables={"TRAININGCOMPILER_ENGINE": "xla"},
        nproc_per_node=4, min_nodes=2, max_nodes=2, gpus_per_node=4, log_dir="logs", master_port=2222,
    )  # fmt: skip
    script = slurm.batch_script(job)
    lines = script.splitlines()
    assert lines[:9] == [
        "#!/bin/bash",
        "#SBATCH --job-name=train",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=4",
        "#SBATCH --gpus-per-node=4",
        "#SBATCH --output=logs/%x-%j.out",
        "export TRAININGCOMPILER_ENGINE=xla",
        "export MASTER_PORT=2222",
        "",
    ]
    assert lines[9].startswith(
        "srun --kill-on-bad-exit=1 --nodes=2 --ntasks-per-node=4 --ntasks=8 --gpus-per-node=4 "
        f"--output=logs/%x-%j-%t.out {sys.executable} "
    )
    assert lines[9].endswith("-m trainingcompiler.worker script train.py --name 'a b'")
    assert 'if [ "$code" -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi' in lines
    (tmp_path / "job.sh").write_text(script)
    assert subprocess.run(["bash", "-n", str(tmp_path / "job.sh")]).returncode == 0


def test_what_an_allocation_says_is_not_said_again():
    assert slurm.srun(Job(arguments=("script", "train.py"), min_nodes=0, max_nodes=0))[:2] == [
        "srun",
        "--kill-on-bad-exit=1",
    ]
    given = slurm.srun(Job(arguments=("script", "train.py"), min_nodes=0, max_nodes=0, nproc_per_node=2))
    assert given[2] == "--ntasks-per-node=2" and "--ntasks" not in " ".join(given[3:])


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, False),
        ({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0"}, False),
        ({"SLURM_STEP_NODELIST": "a", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0"}, True),
        ({"SLURM_STEP_NODELIST": "a", "SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967290"}, False),
    ],
)
def test_tasks_of_srun(environ, expected):
    assert slurm.is_task(environ) is expected


def test_dry_run_prints_what_would_be_done(launch, tmp_path):
    words = ("--launcher=slurm", "--nnodes=2", "--nproc-per-node=2", "--dry-run")
    ran = done(launch("", *words))
    assert ran.returncode == 0 and ran.stdout.startswith("#!/bin/bash\n#SBATCH --job-name=train\n")
    ran = done(launch("", *words, SLURM_JOB_ID="7"))
    assert ran.returncode == 0 and " srun --kill-on-bad-exit=1 --nodes=2 --ntasks-per-node=2 " in ran.stdout
    assert not (tmp_path / "pids").exists()


@pytest.mark.parametrize(("variables", "program"), [({}, "sbatch"), ({"SLURM_JOB_ID": "7"}, "srun")])
def test_without_slurm(launch, variables, program):
    ran = done(launch("", "--launcher=slurm", PATH="", **variables))
    assert ran.returncode == 2
    assert f"--launcher=slurm needs {program}, which is not on the PATH: start it on a login node" in ran.stderr


on_a_cluster = pytest.mark.skipif(bool(slurm_cluster.missing()), reason=slurm_cluster.missing() or "it is here")


@pytest.fixture(scope="module")
def cluster():
    with slurm_cluster.cluster() as variables:
        yield variables


@on_a_cluster
def test_a_job_that_is_handed_in(launch, tmp_path, cluster):
    words = ("--launcher=slurm", "--nproc-per-node=2", "--log-dir=logs")
    ran = done(launch(MET, *words, **cluster))
    assert ran.returncode == 0 and ran.stdout.startswith("Submitted batch job "), ran.stderr
    assert wait_for(lambda: len(list(tmp_path.glob("met-*"))) == 2), [
        path.read_text() for path in tmp_path.glob("logs/*")
    ]
    assert wait_for(lambda: (tmp_path / "met-1").read_text() == "1 2 1 2 0")
    assert (tmp_path / "met-0").read_text() == "0 2 0 2 0"


@on_a_cluster
def test_inside_an_allocation(launch, tmp_path, cluster):
    ran = done(salloc(launch, MET, cluster, "--launcher=slurm", "--nproc-per-node=2"))
    assert ran.returncode == 0, ran.stderr
    assert [(tmp_path / f"met-{rank}").read_text() for rank in (0, 1)] == ["0 2 0 2 0", "1 2 1 2 0"]


@on_a_cluster
def test_the_exit_code_of_the_first_failure(launch, cluster):
    source = "if os.environ['RANK'] == '1':\n    sys.exit(7)\ntime.sleep(600)\n"
    ran = done(salloc(launch, source, cluster, "--launcher=slurm", "--nproc-per-node=2"))
    assert ran.returncode != 0 and "Exited with exit code 7" in ran.stderr


@on_a_cluster
def test_as_a_task_of_srun(launch, tmp_path, cluster):
    launch(MET, "--dry-run", **cluster).wait()  # writes the script
    command = ["srun", "--ntasks=2", sys.executable, "-m", "trainingcompiler.launch", "--no-compile", "train.py"]
    environ = {**os.environ, **cluster}
    ran = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert [(tmp_path / f"met-{rank}").read_text() for rank in (0, 1)] == ["0 2 0 2 0", "1 2 1 2 0"]


def salloc(launch, source, cluster, *words):
    """The launcher, inside an allocation of two tasks."""
    prelude = (
        "import os, sys\n"
        "if 'SLURM_JOB_ID' not in os.environ:\n"
        "    os.execvp('salloc', ['salloc', '--quiet', '--ntasks=2', *sys.orig_argv])"
    )
    return launch(source, *words, prelude=prelude, **cluster)
