"""Compiled workers that are told to stop: at one step, with one checkpoint, and nothing of the run is lost."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from test_ddp import OURS, TOLERANCE, run

SCRIPT = """
import json, os, signal, sys, time
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import trainingcompiler as tc

until, tell = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
model = DistributedDataParallel(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2)))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
first = 0
if os.path.exists("kept.pt"):
    kept = torch.load("kept.pt")
    model.module.load_state_dict(kept["model"])
    optimizer.load_state_dict(kept["optimizer"])
    first = kept["step"]
stop = tc.StopSignal()
dist.barrier()
if rank == 1:
    print("started", flush=True)
for step in range(first, until):
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(100 * step + rank))
    loss = model(x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step == 7 and rank == 1 and tell == "SIGTERM":
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)
    if stop.requested():
        if rank == 0:
            time.sleep(0.5)  # the others wait until it is written
            state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, "kept.pt")
        sys.stdout.write(f"rank {rank} stops after {step + 1}: {stop.reason}\\n")  # at once: so do the others
        sys.stdout.flush()
        dist.barrier()
        dist.destroy_process_group()
        stop.exit()
stop.close()
if rank == 0:
    print(json.dumps([loss.item(), *(p.norm().item() for p in model.parameters())]))
dist.barrier()
dist.destroy_process_group()
"""
FOREVER = "1000000000"


def written(folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    path = folder / "script.py"
    path.write_text(SCRIPT, encoding="utf-8")
    return str(path)


def stopped_at(out: str) -> tuple[int, set[str]]:
    """The step after which both ranks say that they stop, and why they do."""
    told = re.findall(r"^rank (\d) stops after (\d+): (.*)$", out, re.MULTILINE)
    assert sorted(rank for rank, _, _ in told) == ["0", "1"] and len({after for _, after, _ in told}) == 1, out
    return int(told[0][1]), {why for _, _, why in told}


FRAMELESS = """
import os, signal, sys, time
import trainingcompiler as tc

with tc.StopSignal() as stop:
    for step in range(10**9):
        time.sleep(0.01 + 0.01 * int(os.environ["RANK"]))
        if step == 3 and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGUSR1)
        if stop.requested():
            sys.stdout.write(f"rank {os.environ['RANK']} stops after {step + 1}: {stop.reason}\\n")
            sys.stdout.flush()
            stop.exit()
"""


def test_steps_that_are_not_compiled_stop_together_too(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(FRAMELESS, encoding="utf-8")
    done = run([*OURS[:2], "--no-compile", "--nproc-per-node=2", str(path)], tmp_path)
    assert done.returncode == 75, done.stderr[-3000:]
    assert stopped_at(done.stdout)[1] == {"SIGUSR1 at rank 0"}


@pytest.mark.parametrize("launcher", ["local", "elastic"])
def test_one_worker_is_told_and_what_they_save_goes_on_to_the_same_model(launcher, tmp_path):
    options = [*OURS, "--nproc-per-node=2", f"--launcher={launcher}"]
    parts = run([*options, "--max-restarts=2", written(tmp_path / "parts"), FOREVER, "SIGTERM"], tmp_path / "parts")
    assert parts.returncode == 75, parts.stderr[-3000:]
    after, why = stopped_at(parts.stdout)
    assert after > 7 and why == {"SIGTERM at rank 1"}
    assert "started again\n" in parts.stderr and "all workers are started again" not in parts.stderr
    assert f"SIGTERM at rank 1: stopped after {after} steps of this run, leaving with exit code 75" in parts.stderr
    if launcher == "elastic":  # the rest is the script's
        return
    words = [str(after + 10), ""]
    resumed = run([*options, written(tmp_path / "parts"), *words], tmp_path / "parts")
    whole = run([*options, written(tmp_path / "whole"), *words], tmp_path / "whole")
    assert resumed.returncode == whole.returncode == 0, resumed.stderr[-3000:] + whole.stderr[-3000:]
    found, expected = (json.loads(done.stdout.splitlines()[-1]) for done in (resumed, whole))
    assert found == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("launcher", "number"),
    [("local", signal.SIGUSR1), ("local", signal.SIGTERM), ("elastic", signal.SIGUSR1), ("elastic", signal.SIGTERM)],
)
def test_the_launcher_is_told_while_the_first_step_is_compiled(launcher, number, tmp_path):
    path = written(tmp_path / "run")
    environ = {key: value for key, value in os.environ.items() if not key.startswith("TRAININGCOMPILER")}
    environ |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, *OURS, "--nproc-per-node=2", f"--launcher={launcher}", path, FOREVER, ""],
        cwd=tmp_path / "run", env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        hanging = threading.Timer(240, process.kill)
        hanging.start()
        try:
            assert process.stdout is not None
            assert "started\n" in iter(process.stdout.readline, "")  # Gloo may say something first
            process.send_signal(number)
            out, err = process.communicate()
        finally:
            hanging.cancel()
    assert process.returncode == 75, err[-3000:]
    after, why = stopped_at(out)
    assert after >= 1 and all(number.name in said for said in why)  # both were told; one may say so too late
    assert (tmp_path / "run" / "kept.pt").exists()
