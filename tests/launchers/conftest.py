"""What the tests of launchers share: a launcher as a process, of which nothing may be left."""

import os
import subprocess
import sys

import pytest
from launching import PRELUDE, alive, wait_for

from trainingcompiler import config

OURS = {*config.VARIABLES.values(), "OMP_NUM_THREADS"}


@pytest.fixture
def launch(tmp_path):
    """Runs the launcher on the source of a script; what the script writes to `pids` is gone when it is done."""
    started: list[subprocess.Popen] = []

    def start(source: str, *words: str, prelude: str = "", **variables: str) -> subprocess.Popen[str]:
        (tmp_path / "train.py").write_text(PRELUDE + source)
        environ = {name: value for name, value in os.environ.items() if name not in OURS}
        program = f"{prelude}\nfrom trainingcompiler import launch; launch.main()"
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", program, "--no-compile", *words, "train.py"],
                cwd=tmp_path,
                env={**environ, **variables},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()
    assert wait_for(lambda: not alive(tmp_path)), alive(tmp_path)
