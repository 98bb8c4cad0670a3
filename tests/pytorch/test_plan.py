"""`python -m trainingcompiler.plan` on PyTorch scripts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LOOP = """
import argparse
import torch
from torch import nn
from torch.nn import functional as F

parser = argparse.ArgumentParser()
parser.add_argument("--bs", type=int, default=8)
args = parser.parse_args()
model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4))
optimizer = torch.optim.AdamW(model.parameters())
for step in range(3):
    x, y = torch.randn(args.bs, 16), torch.randint(0, 4, (args.bs,))
    optimizer.zero_grad()
    {loss}
    loss.backward()
    optimizer.step()
    print("stepped", optimizer.state_dict()["state"])
"""
PLAIN = LOOP.format(loss="loss = F.cross_entropy(model(x), y)")


@pytest.fixture
def plan(tmp_path):
    """Plans a script; returns the finished process."""

    def run(source: str, *options: str, arguments: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
        script = tmp_path / "train.py"
        script.write_text(source)
        environment = {**os.environ, "TRAININGCOMPILER_CACHE_DIR": str(tmp_path / "cache")}
        command = [sys.executable, "-m", "trainingcompiler.plan", *options, str(script), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    return run


def sizes(done: subprocess.CompletedProcess, path: Path) -> dict[int, dict]:
    assert done.returncode == 0, done.stderr
    return {batch["batch_size"]: batch for batch in json.loads(path.read_text())["batches"]}


def test_no_step_is_taken_and_every_size_is_compiled(plan, tmp_path):
    path = tmp_path / "plans" / "plan.json"
    figure = path.with_name("plan.png")
    done = plan(PLAIN, "--batch-sizes", "8,16,64", "--json", str(path), "--plot", str(figure))
    batches = sizes(done, path)
    assert list(batches) == [8, 16, 64] and "stepped" not in done.stdout
    state = 4 * (16 * 64 + 64 + 64 * 4 + 4)
    assert {batch["parameter_bytes"] for batch in batches.values()} == {state}
    # Two averages, four step counts, and the gradients, which stay readable after a step on one CPU.
    assert {batch["optimizer_bytes"] for batch in batches.values()} == {3 * state + 4 * 4}
    batch_bytes = [batch["memory"]["argument_bytes"] for batch in batches.values()]
    assert batch_bytes[1] - batch_bytes[0] == 8 * (16 * 4 + 8)  # eight rows more of x and y
    assert batches[64]["flops"] > 5 * batches[8]["flops"]
    assert "largest that fits: 64" in done.stdout and not list(path.parent.glob("*.part"))
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_a_second_plan_compiles_nothing(plan):
    first, second = (plan(PLAIN, "--batch-sizes", "8,16") for _ in range(2))
    assert first.stderr.count("[compile]") == 2 and second.stderr.count("[compile]") == 0
    assert first.stdout == second.stdout


def test_the_scripts_own_option_runs_it_again(plan, tmp_path):
    """A number computed from the batch size stays what it was in the recorded loop."""
    source = LOOP.format(loss="logits = model(x); loss = F.cross_entropy(logits.view(args.bs, 4), y)")
    refused = plan(source, "--batch-sizes", "8,16")
    assert refused.returncode == 2
    assert "the step cannot be captured with a batch of 16 in place of 8: something in the loop" in refused.stderr
    assert "--batch-size-arg=--bs" in refused.stderr
    path = tmp_path / "plan.json"
    done = plan(source, "--batch-sizes", "8,16", "--batch-size-arg=--bs", "--json", str(path))
    assert list(sizes(done, path)) == [8, 16]
    own = plan(source, "--batch-sizes", "own", "--json", str(path), arguments=("--bs", "24"))
    assert list(sizes(own, path)) == [24]


def test_an_option_that_is_not_the_batch_size(plan):
    source = PLAIN.replace("parser.parse_args()", "parser.parse_args()\nargs.bs = 8").replace("default=8", "default=4")
    done = plan(source, "--batch-sizes", "8,16", "--batch-size-arg=--bs")
    assert done.returncode == 2
    assert "--bs 16 gave the step a batch of 8: is it the option for the batch size of training?" in done.stderr


def test_tensors_that_disagree_about_the_batch(plan, tmp_path):
    source = LOOP.format(
        loss="loss = F.cross_entropy(model(x) * torch.rand(1, 4), y)",
    ).replace("model(x) * torch.rand(1, 4)", "Scaled(model)(x, torch.rand(1, 4))")
    source = source.replace(
        "optimizer =",
        "class Scaled(nn.Module):\n"
        "    def __init__(self, inner):\n        super().__init__(); self.inner = inner\n"
        "    def forward(self, x, scale):\n        return self.inner(x) * scale\n"
        "model = Scaled(model)\noptimizer =",
    ).replace("Scaled(model)(x,", "model(x,")
    refused = plan(source, "--batch-sizes", "8,16")
    assert refused.returncode == 2
    assert (
        "the tensors that the step is given disagree about the batch: x of Scaled [8, 16] and scale of Scaled [1, 4]. "
        "Name the script's batch size, --script-batch-size N" in refused.stderr
    )
    path = tmp_path / "plan.json"
    done = plan(source, "--batch-sizes", "8,16", "--script-batch-size", "8", "--json", str(path))
    assert list(sizes(done, path)) == [8, 16]
    wrong = plan(source, "--script-batch-size=5")
    assert "--script-batch-size=5: no tensor that the step is given has 5 rows" in wrong.stderr


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            "print('nothing')",
            "train.py reached no optimizer.step() of PyTorch and no training step of Keras",
        ),
        ("raise ValueError('broken')", "the script failed before its first training step (ValueError: broken)"),
        (
            PLAIN.replace("torch.optim.AdamW(model.parameters())", "torch.optim.LBFGS(model.parameters())").replace(
                "optimizer.step()", "optimizer.step(lambda: loss)"
            ),
            "the step of train.py is no program that could be planned: PyTorch would run it, because optimizer",
        ),
    ],
)
def test_scripts_without_a_step_to_plan(plan, source, said):
    done = plan(source)
    assert done.returncode == 2 and done.stderr.rstrip().splitlines()[-1].startswith(f"trainingcompiler.plan: {said}")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--gpu", "h20"), "there is no description of a GPU 'h20'; did you mean h200?"),
        (("--batch-sizes", "8,-1"), "--batch-sizes: '-1' is not a batch size; give whole numbers, 1 or more"),
        (("--batch-sizes", "8", "--batch-sizes", "9"), "--batch-sizes is given twice; give it once"),
        (("--batch-size", "8"), "--batch-size is not an option"),
        (("--no-compile",), "--no-compile is not an option"),
        (("--engine=eager",), "--engine=eager is not an option"),
        (("--gpus", "8"), "--gpus goes with a described GPU: --gpu h100 --gpus 8"),
        (("--gpu=h100", "--strategy=dp"), "--strategy says how several GPUs share the training state; give their"),
        (("--gpu=h100", "--gpus=0"), "--gpus: '0' is not a number of GPUs; give whole numbers, 1 or more"),
        (
            ("--gpu=h100", "--gpus=8", "--strategy=tp"),
            "--strategy=tp: must be dp, fsdp, tp=K or fsdp+tp=K, K being 2 or more",
        ),
    ],
)
def test_wrong_options(plan, options, said):
    done = plan(PLAIN, *options)
    assert done.returncode == 2 and done.stderr.startswith(f"trainingcompiler.plan: {said}")
