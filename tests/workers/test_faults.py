"""What becomes of compiled workers when one of them goes: told, ended, started again; and nothing is lost."""

import json
import os
import time

import pytest
from test_ddp import OURS, run

SCRIPT = """
import json, os, sys
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

kind, at, who = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 1
attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
model = DistributedDataParallel(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2)))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
start = 0
if os.path.exists("kept.pt"):
    kept = torch.load("kept.pt")
    model.module.load_state_dict(kept["model"])
    optimizer.load_state_dict(kept["optimizer"])
    start = kept["step"]
for step in range(start, 20):
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(100 * step + rank))
    loss = model(x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    if step == at and rank == who and attempt == 0:
        if kind == "kill":
            os.kill(os.getpid(), 9)
        if kind == "raise":
            raise RuntimeError("rank 1 has had enough")
        if kind == "leave":
            os._exit(0)
    optimizer.step()
    if kind == "meet" and step == at and attempt == 0:
        if rank == who:
            os.kill(os.getpid(), 9)
        dist.barrier()
    if rank == 0:
        state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
        torch.save(state, "kept.part")
        if kind == "save" and step == at and attempt == 0:
            os.kill(os.getpid(), 9)  # between writing and renaming
        os.replace("kept.part", "kept.pt")
if rank == 0:
    print(json.dumps([loss.item(), *(p.norm().item() for p in model.parameters())]))
dist.barrier()
dist.destroy_process_group()
"""


def launched(folder, *words: str, options: tuple[str, ...] = (), script: str = SCRIPT):
    folder.mkdir(exist_ok=True)
    path = folder / "script.py"
    path.write_text(script, encoding="utf-8")
    marker = f"{folder}/script.py"
    start_s = time.monotonic()
    done = run([*OURS, "--nproc-per-node=2", *options, str(path), *words], folder)
    assert time.monotonic() - start_s < 150, (
        "the launcher says: within 30 s; the rest is starting Python on a busy machine"
    )
    assert not _running(marker), "a worker is left behind"
    return done


def _running(marker: str) -> list[str]:
    found = []
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{process}/cmdline", encoding="utf-8", errors="replace") as file:
                words = file.read()
        except OSError:
            continue
        if marker in words and "trainingcompiler.worker" in words:
            found.append(words)
    return found


def test_a_worker_that_is_killed_ends_the_others_that_wait_for_it(tmp_path):
    done = launched(tmp_path / "run", "kill", "5")
    assert done.returncode == 137, done.stderr[-3000:]
    assert "rank 1 failed first" in done.stderr.splitlines()[-1], done.stderr[-3000:]


def test_the_traceback_of_the_first_that_failed_is_the_last_word(tmp_path):
    done = launched(tmp_path / "run", "raise", "5")
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("RuntimeError: rank 1 has had enough"), done.stderr[-3000:]


def test_a_worker_that_leaves_early_does_not_hang_the_others(tmp_path):
    done = launched(tmp_path / "run", "leave", "5", options=("--exit-timeout=5",))
    assert done.returncode != 0


@pytest.mark.parametrize(("kind", "at"), [("kill", 7), ("kill", 1), ("save", 7)])
def test_what_was_interrupted_goes_on_to_the_same_model(kind, at, tmp_path):
    whole = launched(tmp_path / "whole", "none", "0")
    assert whole.returncode == 0, whole.stderr[-3000:]
    parts = launched(tmp_path / "parts", kind, str(at), options=("--max-restarts=1",))
    assert parts.returncode == 0, parts.stderr[-3000:]
    found, expected = (json.loads(done.stdout.splitlines()[-1]) for done in (parts, whole))
    assert found == pytest.approx(expected, rel=1e-9)
