"""`launch --batch-size`: an ordinary script is planned, and runs with another batch."""

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import argparse
import torch
from torch import nn
from torch.nn import functional as F

parser = argparse.ArgumentParser()
parser.add_argument("--bs", type=int, default=8)
parser.add_argument("--lr", type=float, default=0.1)
parser.add_argument("--accumulate", type=int, default=4)
args = parser.parse_args()
{ask}
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
x, y = torch.randn(256, 16), torch.randint(0, 4, (256,))
place = 0
for step in range(4):
    optimizer.zero_grad()
    for _ in range(args.accumulate):
        rows = slice(place, place + args.bs)
        place += args.bs
        (F.cross_entropy(model(x[rows]), y[rows]) / args.accumulate).backward()
    optimizer.step()
print("trained", args.bs, args.lr, args.accumulate, sum(p.double().sum().item() for p in model.parameters()))
"""
PLAIN = SCRIPT.replace("{ask}", "")
OPTIONS = ("--batch-size-arg=--bs", "--accumulation-arg", "--accumulate", "--lr-arg", "--lr")


@pytest.fixture
def launch(tmp_path):
    """Launches a script; returns the finished process."""

    def run(source: str, *options: str, arguments: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
        script = tmp_path / "train.py"
        script.write_text(source)
        environment = {**os.environ, "TRAININGCOMPILER_CACHE_DIR": str(tmp_path / "cache")}
        command = [sys.executable, "-m", "trainingcompiler.launch", *options, str(script), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    return run


def trained(done: subprocess.CompletedProcess) -> tuple[int, float, int, float]:
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("trained")]
    _, batch, lr, accumulated, total = line.split()
    return int(batch), float(lr), int(accumulated), float(total)


@pytest.mark.exhaustive
def test_keeping_the_global_batch_trains_the_same_model(launch, tmp_path):
    plain = trained(launch(PLAIN))
    done = launch(PLAIN, "--batch-size=keep-global", *OPTIONS, f"--record={tmp_path / 'run.json'}")
    kept = trained(done)
    assert plain[:3] == (8, 0.1, 4) and kept[:3] == (32, 0.1, 1)
    assert kept[3] == pytest.approx(plain[3], abs=1e-5)  # one sum of 32 rows, or four of 8: float32 rounds differently
    assert "[batch]        accumulation_steps: 4 -> 1" in done.stderr
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["batch"]["policy"] == "keep-global" and record["batch"]["recipe"]["batch_size"] == 32
    assert record["run"]["steps"] == 4 and record["command"][1:] == ["--bs", "32", "--accumulate", "1"]


def test_another_global_batch_follows_the_rule(launch, tmp_path):
    done = launch(PLAIN, "--batch-size=64", *OPTIONS, arguments=("--lr=0.05",))
    assert trained(done)[:3] == (64, 0.1, 1)  # 32 rows a step become 64
    assert "linear (SGD follows the gradient's size; Goyal et al. 2017" in done.stderr
    assert "[batch]        lr: 0.05 -> 0.1" in done.stderr
    (record,) = (tmp_path / "cache" / "runs").glob("*-train.json")
    assert json.loads(record.read_text())["batch"]["factor"] == 2


@pytest.mark.exhaustive
def test_a_script_that_asks_is_not_rewritten(launch):
    ask = """
import trainingcompiler as tc
wanted = tc.recommendation()
if wanted is not None:
    args.bs, args.lr, args.accumulate = wanted.recipe.batch_size, wanted.recipe.lr, wanted.recipe.accumulation_steps
"""
    source = SCRIPT.replace("{ask}", ask)
    assert trained(launch(source))[:3] == (8, 0.1, 4)
    assert trained(launch(source, "--batch-size=64", "--lr-scaling=none"))[:3] == (64, 0.1, 1)


def test_without_a_word_for_it_nothing_runs(launch):
    done = launch(PLAIN, "--batch-size=64")
    assert done.returncode == 2 and "trained" not in done.stdout
    assert "the batch size is to change from 8 to 64, and nobody has said how" in done.stderr
    broken = launch("raise ValueError('broken')", "--batch-size=64")
    assert broken.returncode == 2
    said = "trainingcompiler.launch: the script was not planned, see above; without --batch-size it runs as it is"
    assert broken.stderr.splitlines()[-1] == said


def test_without_the_option_nothing_changes(launch, tmp_path):
    assert trained(launch(PLAIN))[:3] == (8, 0.1, 4) and not (tmp_path / "cache" / "runs").exists()
