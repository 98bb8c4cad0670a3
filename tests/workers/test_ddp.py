"""Scripts for several processes train the model that they train under torchrun; whoever diverges is told."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
SCRIPT = HERE / "ddp_script.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]
PLAIN = str(HERE / "plain_worker.py")
OURS = ["-m", "trainingcompiler.launch", "--fallback=error"]
TOLERANCE = 1e-9  # float64: sums in another order differ by 1e-15 a step


def run(words: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess:
    """Runs Python, and lets nothing of it stay behind."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("TRAININGCOMPILER")}
    environ |= {"XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1", **variables}
    with subprocess.Popen(
        [sys.executable, *words], cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            out, err = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def results(name: str, folder: Path, workers: int) -> list[list[float]]:
    return [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(workers)]


@pytest.mark.parametrize(
    ("model", "workers"), [("cnn", 2), ("cnn", 4), ("gpt2", 2), ("gpt2", 4), ("bert", 2), ("bert", 4)]
)
def test_every_rank_sees_what_it_sees_under_torchrun(model, workers, tmp_path):
    plain = run([*TORCHRUN, f"--nproc-per-node={workers}", PLAIN, str(SCRIPT), model, "plain"], tmp_path)
    assert plain.returncode == 0, plain.stderr[-3000:]
    compiled = run([*OURS, f"--nproc-per-node={workers}", str(SCRIPT), model, "compiled"], tmp_path)
    assert compiled.returncode == 0, compiled.stderr[-3000:]
    assert "24 steps (23 compiled, 1 eager)" in compiled.stderr
    for expected, found in zip(
        results("plain", tmp_path, workers), results("compiled", tmp_path, workers), strict=True
    ):
        assert found == pytest.approx(expected, rel=TOLERANCE, abs=1e-12)
    assert compiled.stdout.count("looks") == plain.stdout.count("looks") > 0
    # One worker has compiled what all run.
    makes, loads = compiled.stderr.count("not in the cache"), compiled.stderr.count("cache hit")
    assert makes + loads == compiled.stderr.count("[capture]"), compiled.stderr  # rank 0's, and only rank 0 tells


def test_under_torchrun_itself_a_worker_reads_what_is_there(tmp_path):
    words = ["--nproc-per-node=2", "-m", "trainingcompiler.launch", str(SCRIPT), "cnn", "compiled"]
    done = run([*TORCHRUN, *words], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "23 compiled" in done.stderr


def test_workers_whose_batches_differ_are_told_so(tmp_path):
    done = run([*OURS, "--nproc-per-node=2", str(SCRIPT), "cnn", "x", "uneven"], tmp_path)
    assert done.returncode == 1, done.stderr[-3000:]
    assert "rank 0" in done.stderr and "rank 1" in done.stderr
    assert "workers wait for each other in different programs" in done.stderr or "workers disagree" in done.stderr


UNSEEN = """
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import trainingcompiler as tc

tc.enable()
dist.init_process_group("gloo")
model = DistributedDataParallel(torch.nn.Linear(4, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
generator = torch.Generator().manual_seed(dist.get_rank())
for _ in range(6):
    model(torch.randn(8, 4, generator=generator)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
weights = [torch.zeros(2, 4) for _ in range(2)]
dist.all_gather(weights, model.module.weight.detach())
assert torch.equal(*weights)
dist.destroy_process_group()
"""


def test_workers_that_we_were_not_started_with_are_left_to_torch(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(UNSEEN, encoding="utf-8")
    done = run([*TORCHRUN, "--nproc-per-node=2", PLAIN, str(path)], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "start them with python -m trainingcompiler.launch --nproc-per-node=N train.py" in done.stderr


COMPILED = """
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import trainingcompiler as tc

dist.init_process_group("gloo")
model = DistributedDataParallel(torch.nn.Linear(4, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
generator = torch.Generator().manual_seed(dist.get_rank())


@tc.compile
def train_step(x):
    optimizer.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    return loss


for _ in range(6):
    train_step(torch.randn(8, 4, generator=generator))
weights = [torch.zeros(2, 4) for _ in range(2)]
dist.all_gather(weights, model.module.weight.detach())
assert torch.equal(*weights)
dist.destroy_process_group()
"""


BOTH_WAYS = """
import json, sys
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))

    def forward(self, x):
        return self.layers(x)


dist.init_process_group("gloo")
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
if sys.argv[2] == "inside":
    model = DistributedDataParallel(torch.compile(Net(), backend="eager"))
else:
    model = torch.compile(DistributedDataParallel(Net()), backend="eager")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
generator = torch.Generator().manual_seed(dist.get_rank())
losses = []
for _ in range(20):
    optimizer.zero_grad()
    loss = model(torch.randn(8, 8, generator=generator)).square().mean()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
with open(f"{sys.argv[1]}.{dist.get_rank()}.json", "w") as file:
    json.dump(losses + [p.norm().item() for p in model.parameters()], file)
"""


@pytest.mark.parametrize("place", ["inside", "outside"])
def test_torch_compile_and_ddp(place, tmp_path):
    path = tmp_path / "script.py"
    path.write_text(BOTH_WAYS, encoding="utf-8")
    plain = run([*TORCHRUN, "--nproc-per-node=2", PLAIN, str(path), "plain", place], tmp_path)
    assert plain.returncode == 0, plain.stderr[-3000:]
    compiled = run([*OURS, "--nproc-per-node=2", str(path), "compiled", place], tmp_path)
    assert compiled.returncode == 0, compiled.stderr[-3000:]
    assert "20 steps, " in compiled.stderr, compiled.stderr[-500:]  # all of them compiled
    for expected, found in zip(results("plain", tmp_path, 2), results("compiled", tmp_path, 2), strict=True):
        assert found == pytest.approx(expected, rel=TOLERANCE)


def test_a_function_given_to_compile_averages_in_torch(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(COMPILED, encoding="utf-8")
    done = run([*OURS[:2], "--nproc-per-node=2", str(path)], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "in a function given to tc.compile averages in torch only; run the plain loop" in done.stderr


SYNCHRONIZED = """
import json, sys
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 3))
rank, workers = 0, 1
if len(sys.argv) > 1:
    dist.init_process_group("gloo")
    rank, workers = dist.get_rank(), dist.get_world_size()
    model = DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(model))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
generator = torch.Generator().manual_seed(1)
for _ in range(20):
    x, y = torch.randn(8, 1, 8, 8, generator=generator), torch.randint(0, 3, (8,), generator=generator)
    part = slice(rank * 8 // workers, (rank + 1) * 8 // workers)
    loss = nn.functional.cross_entropy(model(x[part]), y[part])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
if rank == 0:
    print(json.dumps([t.double().norm().item() for t in model.state_dict().values()]))
"""


def test_synchronized_batch_norm_is_that_of_the_whole_batch(tmp_path):
    # torch has it on GPUs only, so the reference is one process with all rows: the same numbers, by definition.
    path = tmp_path / "script.py"
    path.write_text(SYNCHRONIZED, encoding="utf-8")
    whole = run([str(path)], tmp_path)
    assert whole.returncode == 0, whole.stderr[-3000:]
    parts = run([*OURS, "--nproc-per-node=2", str(path), "ddp"], tmp_path)
    assert parts.returncode == 0, parts.stderr[-3000:]
    assert json.loads(parts.stdout.splitlines()[-1]) == pytest.approx(json.loads(whole.stdout), rel=TOLERANCE)


TRAINER = """
import json, sys
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, n_positions=16, vocab_size=64, bos_token_id=0,
                                   eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
rows = torch.randint(0, 64, (160, 16), generator=torch.Generator().manual_seed(1))
data = [{"input_ids": row, "labels": row} for row in rows]


def loss_of(outputs, labels, **_):
    return torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


arguments = TrainingArguments(
    sys.argv[1], per_device_train_batch_size=4, max_steps=20, logging_steps=4, report_to=[], save_steps=10,
    use_cpu=True, disable_tqdm=True, learning_rate=1e-2, optim="sgd", max_grad_norm=0.5, save_total_limit=1,
    eval_strategy="steps", eval_steps=10, gradient_accumulation_steps=2,
)
trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data[:20], compute_loss_func=loss_of)
trainer.train()
names = ("loss", "eval_loss", "grad_norm")
found = [entry[name] for entry in trainer.state.log_history for name in names if name in entry]
found += [p.double().norm().item() for p in model.parameters()]
rank = torch.distributed.get_rank()
with open(f"{sys.argv[2]}.{rank}.json", "w") as file:
    json.dump(found, file)
"""


def test_the_trainers_own_distributed_path(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(TRAINER, encoding="utf-8")
    plain = run([*TORCHRUN, "--nproc-per-node=2", PLAIN, str(path), "a", "plain"], tmp_path)
    assert plain.returncode == 0, plain.stderr[-3000:]
    compiled = run([*OURS, "--nproc-per-node=2", str(path), "b", "compiled"], tmp_path)
    assert compiled.returncode == 0, compiled.stderr[-3000:]
    assert "0 eager" not in compiled.stderr and " compiled" in compiled.stderr
    for expected, found in zip(results("plain", tmp_path, 2), results("compiled", tmp_path, 2), strict=True):
        assert found == pytest.approx(expected, rel=TOLERANCE)


ACCELERATED = """
import json, sys
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
torch.set_default_dtype(torch.float64)
torch.manual_seed(accelerator.process_index)
model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 4))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
generator = torch.Generator().manual_seed(1)
data = TensorDataset(torch.randn(208, 64, generator=generator), torch.randint(0, 4, (208,), generator=generator))
loader = DataLoader(data, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(2))
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 26)
model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
seen = []
for x, y in loader:
    with accelerator.accumulate(model):
        output = model(x)
        loss = nn.functional.cross_entropy(output, y)
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    predictions, labels = accelerator.gather_for_metrics((output.argmax(1), y))
    seen += [loss.item(), (predictions == labels).double().mean().item()]
seen += [p.norm().item() for p in accelerator.unwrap_model(model).parameters()]
with open(f"{sys.argv[1]}.{accelerator.process_index}.json", "w") as file:
    json.dump(seen, file)
if accelerator.is_main_process:
    accelerator.save(accelerator.unwrap_model(model).state_dict(), f"{sys.argv[1]}.pt")
accelerator.wait_for_everyone()
accelerator.end_training()
"""


def test_accelerate(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(ACCELERATED, encoding="utf-8")
    plain = run([*TORCHRUN, "--nproc-per-node=2", PLAIN, str(path), "plain"], tmp_path)
    assert plain.returncode == 0, plain.stderr[-3000:]
    expected = results("plain", tmp_path, 2)
    for strategy in ("dp", "fsdp"):
        done = run([*OURS, f"--strategy={strategy}", "--nproc-per-node=2", str(path), strategy], tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        for one, other in zip(expected, results(strategy, tmp_path, 2), strict=True):
            assert other == pytest.approx(one, rel=TOLERANCE)
        whole, saved = (torch.load(tmp_path / f"{name}.pt") for name in ("plain", strategy))
        for name, tensor in whole.items():
            torch.testing.assert_close(saved[name], tensor, rtol=TOLERANCE, atol=1e-12)
