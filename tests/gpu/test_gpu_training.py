"""Training on a GPU that is there, by PyTorch on CUDA and by XLA: what the CPU's tests assert, once more.

They run where there are a GPU, a CUDA build of torch, and JAX for CUDA: `python -m pytest -m gpu tests/gpu`.
"""

import copy
import subprocess
import sys

import pytest
import torch
from models import JOBS, NOISY_JOBS
from parity import assert_same, train
from small import batches, made, mlp, train_on
from test_compile_step import plain_step
from test_models import PARTLY_FLOAT32, PARTLY_FLOAT32_TOLERANCE, looper, maker
from torch import nn
from torch.nn import functional as F

import trainingcompiler as tc
from trainingcompiler.errors import TrainingCompilerError

pytestmark = pytest.mark.gpu

STEPS = 20
FLOAT64_TOLERANCE = 1e-7  # as on the CPU


def to_gpu(value):
    if isinstance(value, torch.Tensor):
        return value.to("cuda")
    if isinstance(value, dict):
        return {key: to_gpu(item) for key, item in value.items()}
    return type(value)(map(to_gpu, value)) if isinstance(value, list | tuple) else value


def on_gpu(make):
    """A factory of the same objects on the GPU; their optimizer is made after the move, as torch wants it."""

    def made_there():
        with torch.device("cuda"):
            return make()

    return made_there


def both(make, loop, data, **config):
    """An eager and a compiled run on the GPU."""
    make, data = on_gpu(make), to_gpu(data)
    eager = train(make, loop, copy.deepcopy(data), compiled=False)
    run = train(make, loop, copy.deepcopy(data), compiled=True, **config)
    assert not run.fallbacks(), run.fallbacks()
    assert run.statistics.compiled_steps >= run.statistics.steps - 1  # one whose `zero_grad` comes late
    return eager, run


@pytest.mark.parametrize(
    ("name", "optimizer", "clip"),
    [
        ("mlp", "adam", None),
        ("resnet", "sgd", None),
        ("unet", "adamw", 1.0),
        ("lstm", "sgd", 0.25),
        ("gru", "adam", 0.25),
        ("vae", "adam", None),
        ("recommender", "sgd", None),
        ("gpt2", "adamw", 1.0),
        ("bert", "adamw", None),
        ("t5", "adamw", 1.0),
        ("vit", "sgd", 1.0),
        ("llama", "adamw", 1.0),
    ],
)
def test_trains_like_eager_in_float64(name, optimizer, clip):
    job = JOBS[name]
    torch.set_default_dtype(torch.float64)
    try:
        data = [{k: v.double() if v.is_floating_point() else v for k, v in b.items()} for b in job.batches(STEPS)]
        eager, run = both(maker(job, optimizer), looper(job, clip), data)
    finally:
        torch.set_default_dtype(torch.float32)
    tolerance = PARTLY_FLOAT32_TOLERANCE if name in PARTLY_FLOAT32 else FLOAT64_TOLERANCE
    assert_same(eager, run, float64_tolerance=tolerance)
    assert run.statistics.compiles == 1
    assert next(run.objects["model"].parameters()).is_cuda


def autocast_loop(dtype):
    def loop(objects, data):
        scaler = torch.amp.GradScaler("cuda", enabled=dtype is torch.float16, init_scale=2.0**10)
        losses = []
        for x, y in data:
            objects["optimizer"].zero_grad()
            with torch.autocast("cuda", dtype=dtype):
                outputs = objects["model"](x)
                loss = F.cross_entropy(outputs, y)
            assert outputs.dtype is dtype and loss.dtype is torch.float32 and loss.device.type == "cuda"
            scaler.scale(loss).backward()
            scaler.unscale_(objects["optimizer"])
            torch.nn.utils.clip_grad_norm_(objects["model"].parameters(), 1.0)
            scaler.step(objects["optimizer"])
            scaler.update()
            losses.append(loss.item())
        return losses

    return loop


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    make, loop = made(mlp, torch.optim.AdamW, lr=1e-2), autocast_loop(dtype)
    eager, run = both(make, loop, batches())
    # XLA leaves out roundings to 16 bits between operators that it fuses: the noise is what they come to in eager.
    exact = train(
        on_gpu(make), lambda o, data: train_on(o["model"], o["optimizer"], data), to_gpu(batches()), compiled=False
    )
    assert_same(eager, run, exact, floor=0.02)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_dropout_is_the_seeds(name):
    job = NOISY_JOBS[name]
    data, make, loop = to_gpu(job.batches(STEPS)), on_gpu(maker(job, "adamw")), looper(job)
    first, again, other = (train(make, loop, data, compiled=True, seed=seed).observed for seed in (0, 0, 1))
    assert first == pytest.approx(again, rel=1e-4)  # sums on a GPU come in another order in every run
    assert first != pytest.approx(other, rel=1e-2)


def test_a_restored_generator_repeats_the_masks():
    def loop(objects, data):
        seen = []
        for x, _ in data[:2]:
            state = torch.cuda.get_rng_state()
            first = objects["model"](x)
            first.sum().backward()
            torch.cuda.set_rng_state(state)
            second = objects["model"](x)
            second.sum().backward()
            seen += [first.sum().item(), second.sum().item()]
            objects["optimizer"].zero_grad()
            objects["optimizer"].step()
        return seen

    make = made(lambda: nn.Sequential(mlp(), nn.Dropout(0.5)), torch.optim.SGD, lr=0.1)
    seen = train(on_gpu(make), loop, to_gpu(batches()), compiled=True).observed
    assert seen[0::2] == pytest.approx(seen[1::2], rel=1e-5)


def test_a_loop_that_looks_at_everything(tmp_path):
    """Evaluation, metrics, `state_dict`, a file, resumption, a parameter edited in place, gradients read."""

    def loop(objects, data):
        model, optimizer = objects["model"], objects["optimizer"]
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=len(data))
        total, seen = torch.zeros((), device="cuda"), []
        for step, (x, y) in enumerate(data):
            optimizer.zero_grad()
            outputs = model(x)
            loss = F.cross_entropy(outputs, y)
            loss.backward()
            if step == 3:
                seen.append(model[0].weight.grad.abs().sum().item())
            optimizer.step()
            scheduler.step()
            total += loss.detach()
            if step == 5:
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
            if step == 8:
                kept = torch.load(tmp_path / "state.pt", weights_only=True)
                model.load_state_dict(kept["model"])
                optimizer.load_state_dict(kept["optimizer"])
            if step == 10:
                with torch.no_grad():
                    model[0].weight.mul_(0.5)
            if step % 4 == 0:
                model.eval()
                with torch.no_grad():
                    seen.append((model(x).argmax(1) == y).float().mean().item())
                model.train()
            seen += [(outputs.argmax(1) == y).sum().item(), loss.cpu().item()]
        return [*seen, total.item()]

    torch.set_default_dtype(torch.float64)
    try:
        make = made(mlp, torch.optim.SGD, lr=0.1, momentum=0.9)
        data = [(x.double(), y) for x, y in batches()]
        eager, run = both(make, loop, data, keep_gradients=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(eager, run)


def test_code_that_asks_for_the_device():
    class Asking(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x):
            assert x.is_cuda and x.device == self.layer.weight.device
            mask = torch.arange(4, device=x.device) < torch.tensor([3], device="cuda")
            with torch.autocast(device_type=x.device.type, enabled=False):
                return self.layer(x) * mask.to(x.device, x.dtype) + torch.zeros(4).cuda()

    make = made(Asking, torch.optim.SGD, lr=0.1)
    eager, run = both(make, lambda objects, data: train_on(objects["model"], objects["optimizer"], data), batches())
    assert_same(eager, run, eager, floor=1e-4)


def test_a_script_on_the_cpu_trains_on_the_gpu_all_the_same():
    make = made(mlp, torch.optim.AdamW, lr=1e-2)

    def loop(objects, data):
        return train_on(objects["model"], objects["optimizer"], data)

    eager = train(make, loop, batches(), compiled=False)
    run = train(make, loop, batches(), compiled=True)
    assert not run.fallbacks()
    assert_same(eager, run, eager, floor=1e-3)  # two processors
    assert next(run.objects["model"].parameters()).device.type == "cpu"


def test_a_value_out_of_range_is_told_late():
    make = on_gpu(
        made(lambda: nn.Sequential(nn.Embedding(4, 8), nn.Flatten(), nn.Linear(16, 3)), torch.optim.SGD, lr=0.1)
    )

    def loop(objects, data):
        for ids in data:
            objects["optimizer"].zero_grad()
            objects["model"](ids).sum().backward()
            objects["optimizer"].step()
        return []

    data = to_gpu([torch.randint(4, (5, 2)) + (100 if step == 3 else 0) for step in range(8)])
    with pytest.raises(TrainingCompilerError, match="out of range"):
        train(make, loop, data, compiled=True)


def test_tc_compile():
    def loop(objects, data):
        step = tc.compile(plain_step(objects), tc.TrainingCompilerConfig(engine="xla", fallback="error", quiet=True))
        return [step(x, y).item() for x, y in data]

    make = on_gpu(made(mlp, torch.optim.AdamW, lr=1e-2))
    eager = train(make, lambda o, data: train_on(o["model"], o["optimizer"], data), to_gpu(batches()), compiled=False)
    torch.manual_seed(0)
    objects = make()
    observed = loop(objects, to_gpu(batches()))
    assert observed == pytest.approx(eager.observed, rel=1e-3)


TRAINER = """
import torch
import transformers as hf

torch.manual_seed(0)
config = hf.GPT2Config(n_layer=2, n_embd=64, n_head=4, n_positions=32, vocab_size=64, bos_token_id=0, eos_token_id=0)
ids = (torch.arange(32) + torch.randint(64, (256, 1))) % 64
arguments = hf.TrainingArguments(
    "out", max_steps=40, per_device_train_batch_size=16, learning_rate=3e-3, bf16=True, report_to=[], save_steps=20,
    logging_steps=10, disable_tqdm=True,
)
data = [{"input_ids": row, "labels": row} for row in ids]
trainer = hf.Trainer(model=hf.GPT2LMHeadModel(config), args=arguments, train_dataset=data)
trainer.train()
assert trainer.model.device.type == "cuda"
print(trainer.state.log_history[-2]["loss"])
"""

SCRIPT = """
import torch
from torch import nn
from torch.nn import functional as F

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 4)).cuda()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
for step in range(30):
    x = torch.randn(32, 16).to("cuda", non_blocking=True)
    loss = F.cross_entropy(model(x), x[:, :4].argmax(1))
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
torch.cuda.synchronize()
print(f"{loss.item():.3f}")
"""


@pytest.mark.parametrize(("script", "steps"), [(SCRIPT, 30), (TRAINER, 40)], ids=["loop", "Trainer"])
def test_the_launcher(tmp_path, script, steps):
    (tmp_path / "train.py").write_text(script)
    command = [sys.executable, "-m", "trainingcompiler.launch", "--engine=xla", "--fallback=error", "train.py"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout.splitlines()[-1]) < 1.5
    assert "compiled: yes" in ran.stderr and f"{steps} steps" in ran.stderr
