"""Sharded checkpoints of several workers: written by those that hold the parts, resumed on any number of them."""

import json

import pytest
from test_ddp import OURS, TOLERANCE, run

SCRIPT = """
import json, os, sys
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import trainingcompiler as tc

last, kind = int(sys.argv[1]), sys.argv[2]
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
layers = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 64))
rank, size, model = 0, 1, layers
if "RANK" in os.environ:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    model = DistributedDataParallel(layers)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
checkpoints = tc.Checkpoints("kept", model=model, optimizer=optimizer)
start = checkpoints.restore()
for step in range(start, last):
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(step))  # the same rows, however many workers
    loss = model(x[rank * 8 // size : (rank + 1) * 8 // size]).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if (step + 1) % 4 == 0 and (kind != "alone" or rank == 0):
        checkpoints.save(step + 1)
    if kind == "kill" and step == 9 and start == 0 and rank == 1:
        os.kill(os.getpid(), 9)
checkpoints.close()
if rank == 0:
    print(json.dumps([start, *(p.norm().item() for p in layers.parameters())]))
"""
FSDP = ("--nproc-per-node=2", "--strategy=fsdp")


def trained(folder, last: int, *options: str, kind: str = "together", succeeds: bool = True):
    path = folder / "script.py"
    path.write_text(SCRIPT, encoding="utf-8")
    variables = {"JAX_NUM_CPU_DEVICES": "2"} if "--devices=2" in options else {}
    done = run([*OURS, *options, str(path), str(last), kind], folder, **variables)
    if not succeeds:
        return done
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("whole"), 20)[1:]


def test_one_resumes_on_other_numbers_of_workers_and_devices(expected, tmp_path):
    assert trained(tmp_path, 8, *FSDP)[0] == 0
    assert trained(tmp_path, 12, "--devices=2", "--strategy=fsdp")[0] == 8
    assert trained(tmp_path, 16, "--nproc-per-node=2")[0] == 12
    found = trained(tmp_path, 20)
    assert found[0] == 16 and found[1:] == pytest.approx(expected, rel=TOLERANCE)


def test_a_worker_that_is_killed_while_one_is_written_loses_no_other(expected, tmp_path):
    found = trained(tmp_path, 20, *FSDP, "--max-restarts=1", kind="kill")
    assert found[0] in (4, 8)  # the second may not have been complete
    assert found[1:] == pytest.approx(expected, rel=TOLERANCE)


def test_rank_0_alone_may_save_where_nothing_is_divided(expected, tmp_path):
    assert trained(tmp_path, 12, "--nproc-per-node=2", kind="alone")[0] == 0
    found = trained(tmp_path, 20)
    assert found[0] == 12 and found[1:] == pytest.approx(expected, rel=TOLERANCE)


def test_rank_0_alone_is_told_that_others_hold_parts(tmp_path):
    done = trained(tmp_path, 12, *FSDP, kind="alone", succeeds=False)
    assert done.returncode == 1
    assert "rank 0  Checkpoints.save" in done.stderr and "rank 1  train_step" in done.stderr, done.stderr[-3000:]
