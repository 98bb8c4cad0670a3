"""What a script that is planned for a described GPU is shown of it."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from trainingcompiler.frameworks.pytorch.aot.shown_gpu import ShownGpu
from trainingcompiler.frameworks.pytorch.interop import devices
from trainingcompiler.targets.gpus import gpu

GPU = gpu("h100")


def test_the_gpu_is_there_and_tensors_on_it_are_on_the_cpu():
    answers = torch.cuda.is_available(), torch.cuda.device_count()
    with ShownGpu(GPU):
        assert torch.cuda.is_available() and torch.cuda.device_count() == 1
        assert torch.cuda.get_device_name(0) == GPU.name and torch.cuda.get_device_capability() == (9, 0)
        assert torch.cuda.is_bf16_supported()
        assert torch.cuda.get_device_properties("cuda").total_memory == GPU.memory_bytes
        layer = nn.Linear(4, 2)
        assert devices.of(layer.parameters()) == devices.CPU  # nothing has been wanted on the GPU
        made = [
            torch.zeros(2, device="cuda"), torch.ones(2).cuda(), torch.ones(2).to("cuda:0", torch.float64),
            torch.ones(2).pin_memory(), torch.ones(2).to(device=torch.device("cuda"), non_blocking=True),
        ]  # fmt: skip
        with torch.device("cuda"):
            made.append(torch.randn(2))
        assert all(tensor.device.type == "cpu" for tensor in made) and made[2].dtype is torch.float64
        assert devices.of(layer.to("cuda").parameters()) == torch.device("cuda", 0)
        assert devices.of(layer.cuda().parameters()) == torch.device("cuda", 0)
        torch.manual_seed(0), torch.cuda.synchronize()
        with torch.random.fork_rng():
            torch.rand(1)
    assert (torch.cuda.is_available(), torch.cuda.device_count()) == answers
    assert devices.of(layer.parameters()) == devices.CPU


SCRIPT = """
import torch
from torch import nn

device = {device}
net = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 10)){move}
opt = torch.optim.AdamW(net.parameters(), 1e-4)
scaler = torch.amp.GradScaler(device, enabled={scales})
for step in range(3):
    x = torch.randn(64, 16, device=device)
    y = torch.randint(0, 10, (64,)).to(device, non_blocking=True)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = nn.functional.cross_entropy(net(x), y)
    opt.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(opt)
    scaler.update()
"""
# XLA's compiler for GPUs is not needed to see what a step is made of.
DRIVER = """
import sys
from trainingcompiler.cli import run_until
from trainingcompiler.cli.parser import parse
from trainingcompiler.compiling import compiler
from trainingcompiler.planning import planner, search
from trainingcompiler.targets.gpus import gpu
from trainingcompiler.plan import PLAN

waiting = planner.current = planner.Planner(gpu=gpu("h100"))
with waiting.surroundings:
    failure = run_until.run(parse(sys.argv[1:], PLAN), waiting.Enough)
planner.current = None
assert failure is None, failure
rows = waiting.rows()
print(rows, search.product_dtype(compiler.lowered(waiting.program_at(2 * rows)).as_text()), *waiting.step.variants())
"""


@pytest.mark.parametrize(
    ("device", "move", "scales"),
    [('"cuda" if torch.cuda.is_available() else "cpu"', ".to(device)", False), ('"cuda"', ".cuda()", True)],
)
def test_a_script_for_a_gpu_is_planned_as_one(tmp_path, device, move, scales):
    (tmp_path / "train.py").write_text(SCRIPT.format(device=device, move=move, scales=scales))
    environment = {
        **os.environ,
        "TRAININGCOMPILER_ENGINE": "xla",
        "TRAININGCOMPILER_CACHE_DIR": str(tmp_path / "cache"),
    }
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, "train.py"], env=environment, cwd=tmp_path, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["64", "bfloat16"]  # and no bfloat16 is proposed, which it has
