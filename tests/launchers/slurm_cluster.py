"""A Slurm cluster of one host, this machine, for as long as the tests need it."""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from launching import wait_for

from trainingcompiler.processes.host_resources import free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "sinfo")


def missing() -> str:
    """Why there can be no cluster here; "" where there can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: apt install slurmctld slurmd slurm-client munge)"
    return "" if os.getuid() == 0 else "slurmd needs root"


@contextlib.contextmanager
def cluster() -> Iterator[dict[str, str]]:
    """Yields the variables with which Slurm's commands find it."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:
        folder, host = Path(name), socket.gethostname().split(".")[0]
        folder.chmod(0o711)  # munged refuses a socket that others cannot reach
        for part in ("state", "spool"):
            (folder / part).mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        controller, node = free_ports(2)
        (folder / "slurm.conf").write_text(
            f"ClusterName=test\nSlurmctldHost={host}(127.0.0.1)\nSlurmUser=root\nSlurmdUser=root\n"
            f"SlurmctldPort={controller}\nSlurmdPort={node}\n"
            f"AuthType=auth/munge\nAuthInfo=socket={folder}/munge.socket\nCredType=cred/munge\n"
            "ProctrackType=proctrack/pgid\nTaskPlugin=task/none\nMpiDefault=none\nSelectType=select/linear\n"
            "JobAcctGatherType=jobacct_gather/none\nReturnToService=2\n"
            f"StateSaveLocation={folder}/state\nSlurmdSpoolDir={folder}/spool\n"
            f"SlurmctldPidFile={folder}/slurmctld.pid\nSlurmdPidFile={folder}/slurmd.pid\n"
            f"SlurmctldLogFile={folder}/slurmctld.log\nSlurmdLogFile={folder}/slurmd.log\n"
            f"NodeName={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} State=UNKNOWN\n"
            f"PartitionName=test Nodes={host} Default=YES MaxTime=INFINITE State=UP\n"
        )
        variables = {"SLURM_CONF": f"{folder}/slurm.conf", "PATH": _path()}
        munge = {"socket": "munge.socket", "key-file": "munge.key", "log-file": "munged.log"}
        munge |= {"pid-file": "munged.pid", "seed-file": "munge.seed"}
        options = [f"--{option}={folder / file}" for option, file in munge.items()]
        started: list[subprocess.Popen] = []
        with contextlib.ExitStack() as opened:
            log = opened.enter_context((folder / "out").open("w"))
            environ = {**os.environ, **variables}
            for command in (["munged", "--force", "--foreground", *options], ["slurmctld", "-D"], ["slurmd", "-D"]):
                started.append(subprocess.Popen(command, env=environ, stdout=log, stderr=log))
                if len(started) == 1:
                    assert wait_for(lambda: (folder / "munge.socket").exists()), (folder / "out").read_text()
            try:
                sinfo = ["sinfo", "--noheader", "--format=%t"]
                assert wait_for(
                    lambda: subprocess.run(sinfo, env=environ, capture_output=True, text=True).stdout == "idle\n"
                ), (folder / "out").read_text()
                yield variables
            finally:
                for process in reversed(started):
                    process.terminate()
                for process in started:
                    process.wait(30)


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"
