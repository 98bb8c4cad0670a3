"""`--strategy fsdp` between workers: the model of DDP, each worker with a part of the state; and anybody may look."""

import json

import pytest
import safetensors.torch
import torch
from test_ddp import OURS, PLAIN, SCRIPT, TOLERANCE, TORCHRUN, TRAINER, results, run

FSDP = [*OURS, "--strategy=fsdp"]


@pytest.mark.parametrize(("model", "workers"), [("cnn", 4), ("gpt2", 2), ("bert", 2)])
def test_every_rank_sees_what_it_sees_under_torchrun(model, workers, tmp_path):
    plain = run([*TORCHRUN, f"--nproc-per-node={workers}", PLAIN, str(SCRIPT), model, "plain", "wide"], tmp_path)
    assert plain.returncode == 0, plain.stderr[-3000:]
    parts = run([*FSDP, f"--nproc-per-node={workers}", str(SCRIPT), model, "parts", "wide"], tmp_path)
    assert parts.returncode == 0, parts.stderr[-3000:]
    assert "24 steps (23 compiled, 1 eager)" in parts.stderr
    for expected, found in zip(results("plain", tmp_path, workers), results("parts", tmp_path, workers), strict=True):
        assert found == pytest.approx(expected, rel=TOLERANCE, abs=1e-12)
    assert parts.stdout.count("looks") == plain.stdout.count("looks") > 0


LOOKS = """
import json, os, sys
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def say(word, value):
    with open(f"{sys.argv[1]}.{word}.json", "w") as file:
        json.dump(value, file)


def main(name):
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(rank)
    layers = nn.Sequential(nn.Linear(64, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 64))
    model = DistributedDataParallel(layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    average = None
    generator = torch.Generator().manual_seed(rank)
    for step in range(12):
        loss = model(torch.randn(8, 64, generator=generator)).square().mean()
        loss.backward()
        if rank == 0 and step == 2:
            say("between", loss.item())
        optimizer.step()
        optimizer.zero_grad()
        if step == 4 and "trainingcompiler" in sys.modules:  # what this worker holds: parameters, Adam's two for each
            from trainingcompiler.frameworks.pytorch.state import offloaded

            sizes = [p.numel() * p.element_size() for p in model.parameters()]
            small = sum(size for size in sizes if size < 8 * 2**14)
            held = sum(cell._array.addressable_data(0).nbytes for cell in offloaded._offloaded.values())
            assert 0.9 * 3 * sum(sizes) / size < held < 1.1 * 3 * sum(sizes) / size + 3 * small, (held, sum(sizes))
        if rank == 1 % size and step == 5:
            average = [p.detach().clone() for p in model.parameters()]
        if rank == 0 and step == 7:
            torch.save({"model": model.module.state_dict(), "optimizer": optimizer.state_dict()}, f"{name}.pt")
            say("weights", next(model.parameters()).norm().item())
        if step == 7:
            dist.barrier()
        if step == 10 and "trainingcompiler" in sys.modules:
            import trainingcompiler as tc

            tc.disable()  # the last steps are torch's
        if step == 8:
            with torch.no_grad():
                model.module[3].weight.mul_(0.5)  # by all of them
        if step == 9:
            kept = torch.load(f"{name}.pt")
            model.module.load_state_dict(kept["model"])
            optimizer.load_state_dict(kept["optimizer"])
    if average is not None:
        say("average", sum(t.norm().item() for t in average))
    if rank == 0:  # the others have left this function, and their model is gone
        torch.save(model.module.state_dict(), f"{name}.pt")
        say("end", [t.double().norm().item() for t in torch.load(f"{name}.pt").values()])


main(sys.argv[1])
"""


def test_one_rank_alone_may_look_at_values_and_save_the_whole_model(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(LOOKS, encoding="utf-8")
    plain = run([*TORCHRUN, "--nproc-per-node=2", PLAIN, str(path), "plain"], tmp_path)
    parts = run([*FSDP, "--nproc-per-node=2", str(path), "parts"], tmp_path)
    assert parts.returncode == 0, parts.stderr[-3000:]
    assert plain.returncode == 0, plain.stderr[-3000:]
    for word in ("between", "weights", "average", "end"):
        expected, found = (json.loads((tmp_path / f"{name}.{word}.json").read_text()) for name in ("plain", "parts"))
        assert found == pytest.approx(expected, rel=TOLERANCE), word


ASTRAY = """
import sys
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
rank, kind = dist.get_rank(), sys.argv[1]
model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 64)))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)


def step():
    loss = model(torch.randn(8, 64)).square().mean()
    loss.backward()
    if kind == "norm" and rank == 0:
        print(nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
    optimizer.step()
    optimizer.zero_grad()


for index in range(6):
    step()
    if kind == "extra" and index == 3 and rank == 0:
        step()
    if kind == "leave" and index == 3 and rank == 1:
        sys.exit(0)
    if kind == "barrier" and index == 3 and rank == 1:
        dist.barrier()
"""


@pytest.mark.parametrize(
    ("kind", "here", "there"),
    [
        ("norm", "rank 0  forward_backward at script.py", "rank 1  train_step at script.py"),
        ("leave", "rank 0  train_step at script.py", "rank 1  the end of its script"),
        ("barrier", "rank 0  train_step at script.py", "rank 1  barrier"),
        ("extra", "rank 0  train_step at script.py", "rank 1  the end of its script"),
    ],
)
def test_workers_that_come_to_different_things_are_told_at_once(kind, here, there, tmp_path):
    path = tmp_path / "script.py"
    path.write_text(ASTRAY, encoding="utf-8")
    done = run([*FSDP, "--nproc-per-node=2", str(path), kind], tmp_path)
    assert done.returncode == 1, done.stderr[-3000:]
    assert "workers that divide the state have to come to the same" in done.stderr
    assert here in done.stderr and there in done.stderr


def test_layers_are_not_divided_between_workers(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(ASTRAY, encoding="utf-8")
    done = run([*OURS, "--strategy=tp=2", "--nproc-per-node=2", str(path), "x"], tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("or --strategy=fsdp, which divides the state between workers") == 1, done.stderr


def test_the_trainer(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(TRAINER.replace("n_embd=32", "n_embd=128"), encoding="utf-8")
    plain = run([*TORCHRUN, "--nproc-per-node=2", PLAIN, str(path), "a", "plain"], tmp_path)
    assert plain.returncode == 0, plain.stderr[-3000:]
    parts = run([*FSDP, "--nproc-per-node=2", str(path), "b", "parts"], tmp_path)
    assert parts.returncode == 0, parts.stderr[-3000:]
    for expected, found in zip(results("plain", tmp_path, 2), results("parts", tmp_path, 2), strict=True):
        assert found == pytest.approx(expected, rel=TOLERANCE)
    written = [safetensors.torch.load_file(tmp_path / run / "checkpoint-20" / "model.safetensors") for run in "ab"]
    assert set(written[0]) == set(written[1])
    for name, tensor in written[0].items():
        torch.testing.assert_close(written[1][name], tensor, rtol=TOLERANCE, atol=1e-12)


LEAVES = """
import sys
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
rank = dist.get_rank()


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.looks = nn.Linear(128, 128), False

    def forward(self, x):
        x = self.layer(x)
        if self.looks:
            x.register_hook(lambda gradient: gradient * gradient.isfinite().all().item())
        return x


model = DistributedDataParallel(Odd())
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
for step in range(6):
    model.module.looks = step >= 3 and rank == 1
    model(torch.randn(8, 128)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
"""


@pytest.mark.parametrize("strategy", ["dp", "fsdp"])
def test_a_step_that_one_rank_leaves_to_torch_is_told_to_those_who_wait_for_it(strategy, tmp_path):
    path = tmp_path / "script.py"
    path.write_text(LEAVES, encoding="utf-8")
    done = run([*OURS[:2], f"--strategy={strategy}", "--nproc-per-node=2", str(path)], tmp_path)
    assert done.returncode == 1, done.stderr[-3000:]
    assert "rank 0  run 3: train_step" in done.stderr or "rank 0  train_step at" in done.stderr, done.stderr[-3000:]
    assert "rank 1  has left the step to its framework" in done.stderr or (
        "rank 1  PyTorch, to which it has left a step: " in done.stderr
    ), done.stderr[-3000:]


FALLS_BACK = """
import json, sys
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.set_default_dtype(torch.float64)
torch.manual_seed(rank)


@torch.jit.script
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.looks = nn.Linear(128, 128), nn.BatchNorm1d(128), False

    def forward(self, x):
        x = self.norm(self.layer(x))
        return twice(x) if self.looks else x


model = DistributedDataParallel(Odd())
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3)  # a bias before a norm: its gradient is noise
generator = torch.Generator().manual_seed(rank)
losses = []
for step in range(10):
    model.module.looks = step >= 4  # on all of them
    loss = model(torch.randn(8, 128, generator=generator)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
if rank == 0:
    losses += [t.double().norm().item() for t in model.state_dict().values()]
    print("losses " + json.dumps(losses))
"""


def test_a_step_that_all_leave_to_torch_goes_on_with_the_whole_state(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(FALLS_BACK, encoding="utf-8")
    plain = run([*TORCHRUN, "--nproc-per-node=2", PLAIN, str(path)], tmp_path)
    assert plain.returncode == 0, plain.stderr[-3000:]
    parts = run([*OURS[:2], "--strategy=fsdp", "--nproc-per-node=2", str(path)], tmp_path)
    assert parts.returncode == 0, parts.stderr[-3000:]
    assert "4 compiled" in parts.stderr or "3 compiled" in parts.stderr, parts.stderr[-500:]
    found, expected = (next(x for x in done.stdout.splitlines() if x.startswith("losses")) for done in (parts, plain))
    assert json.loads(found[7:]) == pytest.approx(json.loads(expected[7:]), rel=TOLERANCE)


ALONE = """
import json, sys
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 64)))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
generator = torch.Generator().manual_seed(rank)
losses = []
for step in range(12):
    x = torch.randn(8, 64, generator=generator)
    if step in (4, 5):  # each worker by itself: their copies differ from here on
        with model.no_sync():
            loss = model(x).square().mean()
            loss.backward()
    else:
        loss = model(x).square().mean()
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
losses += [p.norm().item() for p in model.parameters()]
with open(f"{sys.argv[1]}.{rank}.json", "w") as file:
    json.dump(losses, file)
"""


def test_what_workers_change_alone_is_not_divided_any_more(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(ALONE, encoding="utf-8")
    plain = run([*TORCHRUN, "--nproc-per-node=2", PLAIN, str(path), "plain"], tmp_path)
    assert plain.returncode == 0, plain.stderr[-3000:]
    parts = run([*FSDP, "--nproc-per-node=2", str(path), "parts"], tmp_path)
    assert parts.returncode == 0, parts.stderr[-3000:]
    assert "are updated by gradients that this program does not average over the workers" in parts.stderr
    for expected, found in zip(results("plain", tmp_path, 2), results("parts", tmp_path, 2), strict=True):
        assert found == pytest.approx(expected, rel=TOLERANCE)
