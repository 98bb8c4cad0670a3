"""Several workers on one host, as processes: exit codes, the first error last, signals, restarts, nothing left."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
from launching import alive, done, interrupt, wait_for

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="process groups and signals of POSIX")

TWO = "--nproc-per-node=2"
READY = "pathlib.Path(f'ready-{rank}').touch()\n"
FAIL_1 = "if rank == '1':\n    wait_for('ready-0')\n    raise ValueError('on purpose')\n"
SLEEP = "time.sleep(600)\n"
CHILD = (
    "child = subprocess.Popen([sys.executable, '-c', 'import signal, time;'"
    " 'signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)'])\n"
    "note(child.pid)\n"
)
IMPATIENT = (
    "from trainingcompiler.launchers import group, supervisor\n"
    "group.KILL_GRACE_S = supervisor.KILL_GRACE_S = group._CHILDREN_GRACE_S = 0.5"
)


def test_each_worker_has_torchs_variables(launch):
    source = (
        "names = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE', 'GROUP_RANK', 'NODE_RANK', 'MASTER_ADDR', "
        "'OMP_NUM_THREADS', 'TORCHELASTIC_RESTART_COUNT')\n"
        "say(*(os.environ[name] for name in names), os.environ['MASTER_PORT'].isdecimal())\n"
    )
    ran = done(launch(source, TWO))
    assert (ran.returncode, sorted(ran.stdout.splitlines())) == (
        0,
        ["0 2 0 2 0 0 127.0.0.1 1 0 True", "1 2 1 2 0 0 127.0.0.1 1 0 True"],
    )
    assert ran.stderr.startswith("[launch]     OMP_NUM_THREADS=1 in each worker, as torchrun sets it")
    assert ran.stderr.count("compiled: no") == 1  # by rank 0 alone


def test_tensorflow_is_told_of_the_same_workers(launch, tmp_path):
    done(launch("pathlib.Path(f'tf-{rank}').write_text(os.environ['TF_CONFIG'])", TWO))
    first, second = (json.loads((tmp_path / f"tf-{rank}").read_text()) for rank in (0, 1))
    assert first["cluster"] == second["cluster"] and len(set(first["cluster"]["worker"])) == 2
    assert (first["task"], second["task"]) == ({"type": "worker", "index": 0}, {"type": "worker", "index": 1})


def test_a_given_port_and_omp_num_threads_hold(launch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    source = "print(os.environ['MASTER_PORT'], os.environ['OMP_NUM_THREADS'])"
    ran = done(launch(source, "--nproc_per_node", "1", f"--master-port={port}", OMP_NUM_THREADS="3"))
    assert (ran.returncode, ran.stdout) == (0, f"{port} 3\n")
    assert "OMP_NUM_THREADS" not in ran.stderr


def test_the_first_traceback_comes_last_and_nothing_is_left(launch, tmp_path):
    late = "try:\n    time.sleep(600)\nfinally:\n    raise KeyError('follows')\n"
    handler = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))\n"
    ran = done(launch(CHILD + handler + READY + FAIL_1 + late, TWO))
    assert ran.returncode == 1
    lines = ran.stderr.splitlines()
    assert lines[-1] == "ValueError: on purpose"
    begin = lines.index("[launch]     rank 1 failed first (exit code 1):")
    assert lines[begin - 1] == "[launch]     rank 0 failed after that: KeyError: 'follows'"
    assert lines[begin + 1] == "Traceback (most recent call last):"
    assert ran.stderr.count("Traceback") == 1
    assert not alive(tmp_path)


def test_a_killed_worker_is_named_before_those_who_noticed(launch, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    killed = "if rank == '1':\n    pipe = open('pipe', 'w')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    ran = done(launch(killed + "open('pipe').read()\nraise ConnectionError('rank 1 is gone')\n", TWO))
    assert ran.returncode == 137
    lines = ran.stderr.splitlines()
    assert lines[-1].startswith("[launch]     rank 1 failed first: ended by SIGKILL;")
    assert "[launch]     rank 0 failed after that: ConnectionError: rank 1 is gone" in lines


def test_exit_codes_without_a_traceback(launch):
    ran = done(launch(READY + "if rank == '1':\n    wait_for('ready-0')\n    sys.exit(3)\n" + SLEEP, TWO))
    assert ran.returncode == 3
    assert ran.stderr.splitlines()[-1] == (
        "[launch]     rank 1 failed first: exit code 3; it left no traceback, what it said is above"
    )


def test_a_worker_that_is_killed(launch, tmp_path):
    source = READY + "if rank == '1':\n    wait_for('ready-0')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    ran = done(launch(CHILD + source + SLEEP, TWO))
    assert ran.returncode == 128 + signal.SIGKILL
    assert "[launch]     rank 1 failed first: ended by SIGKILL; often the kernel does this" in ran.stderr
    assert not alive(tmp_path)


def test_those_that_do_not_end_are_killed(launch, tmp_path):
    source = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + READY + FAIL_1 + SLEEP
    ran = done(launch(source, TWO, prelude=IMPATIENT))
    assert (ran.returncode, ran.stderr.splitlines()[-1]) == (1, "ValueError: on purpose")
    assert not alive(tmp_path)


def test_a_failed_worker_that_hangs_on_its_way_out_is_not_waited_for(launch, tmp_path):
    source = "import atexit\natexit.register(lambda: time.sleep(600))\n" + READY + FAIL_1 + SLEEP
    ran = done(launch(source, TWO, prelude=f"{IMPATIENT}; group._FAILED_EXIT_S = 0.5"))
    assert (ran.returncode, ran.stderr.splitlines()[-1]) == (1, "ValueError: on purpose")
    assert "rank 1 failed first (did not end by itself):" in ran.stderr
    assert not alive(tmp_path)


def test_nothing_survives_the_launchers_death(launch, tmp_path):
    process = launch(CHILD + READY + SLEEP, TWO)
    interrupt(process, tmp_path, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert wait_for(lambda: not alive(tmp_path))
    assert len(list((tmp_path / "pids").iterdir())) == 4


UNTOLD = """
import os, signal, subprocess, sys
from trainingcompiler.launchers.reaper import guarding

with guarding(sys.argv[1]):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env={"FOLDER": sys.argv[1]})
    print(child.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


TOLD = """
import os, signal, subprocess, sys, time
from trainingcompiler.launchers.reaper import guarding

with guarding(sys.argv[1] + "/own") as tell:
    while True:
        child = subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL, start_new_session=True)
        if child.pid % 10 == 0:
            break
        child.kill()
    tell(child.pid)
    print(child.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not show a process's environment")
def test_a_worker_that_the_guardian_was_not_told_of_does_not_survive_either(tmp_path):
    command = [sys.executable, "-c", UNTOLD, str(tmp_path / "own")]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60, check=False)
    assert ran.returncode == -signal.SIGKILL
    (tmp_path / "pids").mkdir()
    (tmp_path / "pids" / ran.stdout.strip()).touch()
    assert wait_for(lambda: not alive(tmp_path))


def test_a_worker_of_any_number_does_not_survive(tmp_path):
    # A number that ended in 0 once was taken for the launcher's "all is well".
    ran = subprocess.run([sys.executable, "-c", TOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, check=False)
    assert ran.returncode == -signal.SIGKILL
    (tmp_path / "pids").mkdir()
    (tmp_path / "pids" / ran.stdout.strip()).touch()
    assert ran.stdout.strip().endswith("0")
    assert wait_for(lambda: not alive(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_reach_every_worker(launch, tmp_path, number):
    handler = f"signal.signal({int(number)}, lambda *_: (pathlib.Path(f'told-{{rank}}').touch(), sys.exit(0)))\n"
    process = launch(handler + READY + SLEEP, TWO)
    interrupt(process, tmp_path, number)
    assert done(process).returncode == 0
    assert len(list(tmp_path.glob("told-*"))) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_workers_that_a_signal_ends(launch, tmp_path, number):
    process = launch(CHILD + READY + SLEEP, TWO, "--max-restarts=3", prelude=IMPATIENT)
    interrupt(process, tmp_path, number)
    ran = done(process)
    assert ran.returncode == 128 + number
    assert "started again" not in ran.stderr
    assert not alive(tmp_path)


def test_whoever_saves_is_given_time_and_asks_to_be_queued_again(launch, tmp_path):
    saving = "def save(*_):\n    time.sleep(0.5)\n    print('saved')\n    sys.exit(75)\n"
    source = saving + "if rank == '0':\n    signal.signal(signal.SIGTERM, save)\n" + READY + SLEEP
    process = launch(source, TWO, "--max-restarts=3")
    interrupt(process, tmp_path, signal.SIGTERM)
    ran = done(process)
    assert (ran.returncode, ran.stdout) == (75, "saved\n")
    assert "started again" not in ran.stderr and "failed" not in ran.stderr


def test_a_group_is_started_again_from_the_scripts_own_checkpoint(launch):
    source = (
        "attempt = int(os.environ['TORCHELASTIC_RESTART_COUNT'])\n"
        "say(f'{rank} at {attempt}')\n"
        "if attempt < 2:\n"
        "    pathlib.Path(f'ready-{rank}-{attempt}').touch()\n"
        "    wait_for(f'ready-0-{attempt}')\n"
        "    if rank == '1':\n"
        "        raise ValueError(f'on purpose, {attempt}')\n"
        "    time.sleep(600)\n"
    )
    ran = done(launch(source, TWO, "--max-restarts=2"))
    assert ran.returncode == 0
    assert sorted(ran.stdout.splitlines()) == [f"{rank} at {attempt}" for rank in (0, 1) for attempt in (0, 1, 2)]
    assert "restart 1 of 2" in ran.stderr and "restart 2 of 2" in ran.stderr
    assert ran.stderr.index("on purpose, 0") < ran.stderr.index("restart 1 of 2") < ran.stderr.index("on purpose, 1")
    ran = done(launch(source, TWO, "--max-restarts=1"))
    assert (ran.returncode, ran.stderr.splitlines()[-1]) == (1, "ValueError: on purpose, 1")


def test_bad_input_is_not_tried_again(launch):
    ran = done(launch("sys.exit(2)", TWO, "--max-restarts=3"))
    assert ran.returncode == 2
    assert "started again" not in ran.stderr


def test_those_that_go_on_alone_may_for_a_while(launch, tmp_path):
    source = "if rank == '0':\n    time.sleep(1)\n    print('evaluated')\n"
    ran = done(launch(source, TWO))
    assert (ran.returncode, ran.stdout) == (0, "evaluated\n")
    ran = done(launch("if rank == '0':\n    time.sleep(600)\n", TWO, "--exit-timeout=0.5"))
    assert ran.returncode == 1
    assert "rank 0 is still running 0.5 s after the first worker finished, and ended now" in ran.stderr
    assert "give --exit-timeout=SECONDS" in ran.stderr
    assert not alive(tmp_path)


def test_output_with_the_rank_in_front_and_in_files(launch, tmp_path):
    source = "say('out', rank)\nsay('err', rank, stream=sys.stderr)\nsys.stdout.write('bar\\rend')\n"
    ran = done(launch(source, TWO, "--log-dir=logs", "--rdzv-id=mine"))
    assert ran.returncode == 0
    # With universal newlines a progress bar's \r reads as a line's end.
    assert sorted(ran.stdout.splitlines()) == [f"[rank{rank}]: {text}" for rank in (0, 1) for text in
                                               ("bar", "end", f"out {rank}")]  # fmt: skip
    assert "[rank1]: err 1\n" in ran.stderr
    (folder,) = (tmp_path / "logs").iterdir()
    assert folder.name.startswith("mine_")
    assert f"[launch]     output of the workers: {folder.relative_to(tmp_path)}\n" in ran.stderr
    assert (folder / "attempt_0" / "1" / "stdout.log").read_bytes() == b"out 1\nbar\rend"
    assert "err 1\n" in (folder / "attempt_0" / "1" / "stderr.log").read_text()


def test_output_of_some(launch, tmp_path):
    source = "say('out', rank)\nsay('err', rank, stream=sys.stderr)\n"
    ran = done(launch(source, TWO, "--local-ranks-filter=1"))
    assert ran.stdout == "out 1\n" and "err 1" in ran.stderr and "err 0" not in ran.stderr
    ran = done(launch(source, TWO, "--tee=1", "--local-ranks-filter=1"))
    assert ran.stdout == "[rank1]: out 1\n" and "\nerr 1\n" in f"\n{ran.stderr}"
    ran = done(launch(source, TWO, "--tee=0", "--log-dir=logs"))
    assert ran.stdout == "" and "err" not in ran.stderr
    assert len(list(tmp_path.glob("logs/*/attempt_0/*/*.log"))) == 4


def test_dry_run_prints_the_commands_and_starts_nothing(launch, tmp_path):
    ran = done(launch("", TWO, "--dry-run"))
    first, second = ran.stdout.splitlines()
    assert ran.returncode == 0 and " RANK=0 " in first and " RANK=1 " in second
    assert first.endswith(f"{sys.executable} -m trainingcompiler.worker script train.py")
    assert not (tmp_path / "pids").exists()
    (line,) = done(launch("", "--dry-run")).stdout.splitlines()
    assert "RANK" not in line and line.endswith("-m trainingcompiler.worker script train.py")


def test_a_port_in_use(launch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        ran = done(launch("", TWO, f"--master-port={port}"))
    assert ran.returncode == 2
    assert ran.stderr == (
        f"trainingcompiler.launch: --master-port={port}: somebody listens on this port already; give another one, or "
        "none: then a free one is found\n"
    )


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "4"}, "is itself a worker (RANK=1, WORLD_SIZE=4)"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "this process is one of 4 tasks of srun"),
    ],
)
def test_workers_inside_of_workers(launch, variables, said):
    ran = done(launch("", TWO, **variables))
    assert ran.returncode == 2
    assert ran.stderr.startswith("trainingcompiler.launch: --nproc-per-node=2: ") and said in ran.stderr


def test_the_launchers_own_signals_are_given_back(launch):
    after = "import atexit, signal\natexit.register(lambda: print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL))"
    ran = done(launch("", "--nproc-per-node=1", prelude=after))
    assert (ran.returncode, ran.stdout) == (0, "True\n")
