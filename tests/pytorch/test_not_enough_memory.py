"""A step that does not fit into memory is known before it runs; and the plan is what the step then takes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import trainingcompiler as tc
from trainingcompiler.compiling import memory
from trainingcompiler.compiling.memory import Buffer, largest_buffers

TOO_LARGE = """
import torch
from torch import nn

model = nn.Sequential(nn.Linear(1, 1_000_000), nn.Tanh(), nn.Linear(1_000_000, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
x, y = torch.randn(500_000, 1), torch.randn(500_000, 1)
optimizer.zero_grad()
loss = nn.functional.mse_loss(model(x), y)
loss.backward()
optimizer.step()
print("stepped")
"""


def launched(folder: Path, source: str, *options: str) -> subprocess.CompletedProcess:
    script = folder / "train.py"
    script.write_text(source)
    environment = {**os.environ, "TRAININGCOMPILER_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, "-m", "trainingcompiler.launch", *options, str(script)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_step_of_terabytes_ends_before_it_begins(tmp_path):
    done = launched(tmp_path, TOO_LARGE)
    assert done.returncode == 1 and "stepped" not in done.stdout
    said = done.stderr[done.stderr.index("NotEnoughMemoryError: ") :]
    assert "train_step needs 3783.50 GiB besides its state and its batch, and" in said
    assert "are available; nothing of it has run. Its largest arrays:\n" in said
    assert "1862.65 GiB  f32[500000,1000000]  train.py:9" in said
    assert "python -m trainingcompiler.plan says which fits" in said


def test_cures_are_programs_that_were_compiled(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(2048, 64)
    available = 120 * 2**20
    monkeypatch.setattr(memory.check, "__defaults__", (lambda: available,))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    tc.enable(tc.TrainingCompilerConfig(engine="xla", quiet=True))
    try:
        with pytest.raises(tc.NotEnoughMemoryError) as raised:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    finally:
        tc.disable()
    error = raised.value
    assert isinstance(error, MemoryError) and error.available_bytes == available < error.needed_bytes
    assert any("f32[2048,4096]  test_not_enough_memory.py:" in buffer for buffer in error.buffers)
    batch, precision = error.cures
    assert batch.startswith("a batch of ") and "in place of 2048, accumulated" in batch
    assert batch.endswith("MiB (compiled)")
    assert precision.startswith('torch.autocast("cpu", dtype=torch.bfloat16) around the forward: ')
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


TEXT = """HloModule jit_train_step

%fused (p: f32[64]) -> f32[64] {
  %big = f32[9999999]{0} exponential(%p), metadata={op_name="jit(train_step)/model.py:1/exp"}
}

ENTRY %main (a: f32[4096,50257]) -> f32[8] {
  %a = f32[4096,50257]{1,0} parameter(0)
  %fusion.1 = bf16[4096,50257]{1,0} fusion(%a), kind=kLoop, calls=%fused, metadata={op_name="jit(train_step)/model.py:7/dot"}
  %fusion.2 = bf16[4096,50257]{1,0} fusion(%a), kind=kLoop, calls=%fused, metadata={op_name="jit(train_step)/model.py:7/mul"}
  %view = f32[50257,4096]{1,0} bitcast(%fusion.1)
  %copy-done = f32[4096,50257]{1,0} copy-done(%view)
  %other = f32[8]{0} add(%view, %view), metadata={op_name="train_step/dense/MatMul"}
  ROOT %last = s64[2]{0} convert(%other)
}
"""  # noqa: E501


def test_the_largest_arrays_of_a_program():
    assert largest_buffers(TEXT) == [
        Buffer(size_bytes=2 * 4096 * 50257, count=2, description="bf16[4096,50257]", where="model.py:7"),
        Buffer(size_bytes=32, count=1, description="f32[8]", where="dense/MatMul"),
        Buffer(size_bytes=16, count=1, description="s64[2]", where=None),
    ]
    assert str(largest_buffers(TEXT, 1)[0]) == "2 x 392.63 MiB  bf16[4096,50257]  model.py:7"


def test_the_limit_of_a_container(tmp_path):
    assert memory._of_cgroup(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("3000\n")
    (tmp_path / "memory.stat").write_text("anon 1000\ninactive_file 500\n")
    assert memory._of_cgroup(tmp_path) is None
    (tmp_path / "memory.max").write_text("8000\n")
    assert memory._of_cgroup(tmp_path) == 5500
