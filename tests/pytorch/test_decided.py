"""`launch --batch-size`: what was decided trains, however the script comes by its rate; or nothing is trained."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import argparse
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import *

parser = argparse.ArgumentParser()
parser.add_argument("--bs", type=int, default=16)
parser.add_argument("--lr", type=float, default=0.01)
parser.add_argument("--wd", type=float, default=0.1)
parser.add_argument("--accumulate", type=int, default=1)
args = parser.parse_args()
{first}
torch.manual_seed(0)
x, y = torch.randn(512, 8), torch.randint(0, 4, (512,))
steps = 512 // (args.bs * args.accumulate)
rate, models, optimizers, schedules = {rate}, [], {{}}, []

def layers():
    models.append(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)))
    return models[-1]

{make}
model = nn.ModuleList(models)
highest, place = {{}}, 0
for step in range(steps):
    {before}
    for _ in range(args.accumulate):
        rows = slice(place, place + args.bs)
        place += args.bs
        loss = sum(F.cross_entropy(model(x[rows]), y[rows]) for model in models)
        (loss / args.accumulate).backward()
    for name, optimizer in optimizers.items():
        rates = [group["lr"] for group in optimizer.param_groups]
        highest[name] = [max(pair) for pair in zip(rates, highest.get(name, rates))]
        optimizer.step()
        optimizer.zero_grad()
    for schedule in schedules:
        schedule.step()
print("trained", args.bs, steps)
for name, rates in highest.items():
    print(name, *[f"{{rate:.6f}}" for rate in rates], optimizers[name].param_groups[0]["weight_decay"])
"""
# Every way of coming by a rate, each with an optimizer of its own, in one script.
MAKE = """
optimizers["constant"] = torch.optim.Adam(layers().parameters(), rate)
body, head = layers()[0], models[-1][2]
groups = [{"params": body.parameters()}, {"params": head.parameters(), "lr": 10 * rate}]
optimizers["groups"] = torch.optim.Adam(groups, rate)
optimizers["one-cycle"] = torch.optim.Adam(layers().parameters(), rate)
schedules.append(OneCycleLR(optimizers["one-cycle"], rate, total_steps=steps, pct_start=0.5))
optimizers["warm-up"] = torch.optim.Adam(layers().parameters(), rate)
warm = max(1, steps // 4)
schedules.append(LambdaLR(optimizers["warm-up"], lambda step: min(1, (step + 1) / warm)))
optimizers["cosine"] = torch.optim.Adam(layers().parameters(), rate)
schedules.append(CosineAnnealingLR(optimizers["cosine"], steps))
optimizers["sequence"] = torch.optim.Adam(layers().parameters(), rate)
parts = [LinearLR(optimizers["sequence"], 0.1, total_iters=2), CosineAnnealingLR(optimizers["sequence"], steps)]
schedules.append(SequentialLR(optimizers["sequence"], parts, [2]))
optimizers["by-hand"] = torch.optim.Adam(layers().parameters(), rate)
"""
BY_HAND = 'optimizers["by-hand"].param_groups[0]["lr"] = rate * min(1, (step + 1) / 4)'
ADAM = 'optimizers["one"] = torch.optim.Adam(layers().parameters(), rate)\n'
ALL = ("--batch-size-arg=--bs", "--lr-arg=--lr", "--accumulation-arg=--accumulate")


def source(make: str = ADAM, *, rate: str = "args.lr", first: str = "", before: str = "pass") -> str:
    return SCRIPT.format(make=make, rate=rate, first=first, before=before)


@pytest.fixture
def launch(tmp_path):
    """Launches a script with another batch; returns the finished process."""

    def run(text: str, *options: str, arguments: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
        script = tmp_path / "train.py"
        script.write_text(text)
        environment = {**os.environ, "TRAININGCOMPILER_CACHE_DIR": str(tmp_path / "cache")}
        command = [sys.executable, "-m", "trainingcompiler.launch", *options, str(script), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    return run


def trained(done: subprocess.CompletedProcess) -> dict[str, list[float]]:
    """The batch and the steps, and the highest rate of each group with its weight decay."""
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    return {name: [float(word) for word in words] for name, *words in lines}


def near(peak: float) -> object:
    """A schedule is seen at whole steps only: the highest of OneCycle's eight is 1% below its peak."""
    return pytest.approx(peak, rel=0.02)


# 16 rows become 64: Adam's rates are to be doubled.
@pytest.mark.parametrize(("rate", "peak"), [("args.lr", 0.02), ("args.lr * args.bs * args.accumulate / 64", 0.005)])
@pytest.mark.exhaustive(but=["args.lr-0.02"])
def test_the_decided_rates_train_however_a_script_comes_by_them(launch, rate, peak):
    done = launch(source(MAKE, rate=rate, before=BY_HAND), "--batch-size=64", *ALL)
    found = trained(done)
    assert found.pop("trained") == [64, 8]
    assert found.pop("groups") == [near(peak), near(10 * peak), 0]
    assert list(found) == ["constant", "one-cycle", "warm-up", "cosine", "sequence", "by-hand"]
    assert all(rates == [near(peak), 0] for rates in found.values()), found
    assert f"[batch]        lr: {peak / 2:g} -> {peak:g}\n" in done.stderr
    made_up = "the script itself makes its rates 4 times as large with this batch: it is given --lr 0.005, so that the"
    assert (made_up in done.stderr) == (peak == 0.005)
    said = (
        "what the script's schedule counts in steps stays its own (OneCycleLR, LambdaLR, CosineAnnealingLR, Sequential"
    )
    assert said in done.stderr
    assert f"[batch]        LambdaLR begins at {peak / 2:g} and goes up to {peak:g}; planned it began at" in done.stderr


@pytest.mark.exhaustive
def test_a_script_that_scales_by_the_rule_itself_needs_no_option_for_its_rate(launch):
    text = source(ADAM.replace("Adam", "SGD"), rate="args.lr * args.bs / 64")
    assert trained(launch(text, "--batch-size=64", "--batch-size-arg=--bs")) == {"trained": [64, 8], "one": [0.01, 0]}


@pytest.mark.exhaustive
def test_keeping_the_global_batch_keeps_the_rate_of_a_script_that_scales_itself(launch):
    """One that also works out itself how many batches it accumulates."""
    text = source(rate="args.lr * args.bs / 64", first="args.accumulate = 64 // args.bs")
    done = launch(text, "--batch-size=keep-global", "--batch-size-arg=--bs", "--lr-arg=--lr")
    assert trained(done) == {"trained": [64, 8], "one": [0.0025, 0]}
    refused = launch(text, "--batch-size=keep-global", "--batch-size-arg=--bs")
    assert refused.returncode == 2 and "trained" not in refused.stdout
    assert "  the learning rate of Adam: 0.0025 decided, 0.01 in the script\n" in refused.stderr
    assert "Name the script's options for them, --lr-arg=--... and --weight-decay-arg=--..., or have" in refused.stderr


LAMBDA = 'schedules.append(LambdaLR(optimizers["one"], lambda step: args.bs / 16 * 0.99**step))'
SCALED_BY_HAND = 'optimizers["one"].param_groups[0]["lr"] = rate * args.bs / 64'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            source(MAKE.replace("10 * rate", "0.1"), before=BY_HAND),
            "trainingcompiler.launch: the script would not train as decided with --lr 0.02; nothing has been trained:\n"
            "  the learning rate of Adam's group 1: 0.2 decided, 0.1 in the script\n"
            "Is that the option for all of them? Name the right one, or have the script ask",
        ),
        (
            source(before=SCALED_BY_HAND),
            "  the learning rate of Adam in the first step: 0.005 decided, 0.02 in the script, which sets it by hand\n",
        ),
    ],
    ids=("fixed-head", "scaled-by-hand"),
)
@pytest.mark.exhaustive(but=["scaled-by-hand"])
def test_what_would_not_train_as_decided_is_refused(launch, text, said):
    done = launch(text, "--batch-size=64", *ALL)
    assert done.returncode == 2 and "trained" not in done.stdout
    assert said in done.stderr


@pytest.mark.exhaustive
def test_a_schedule_that_scales_itself_is_made_up_for(launch):
    """LambdaLR is asked for its peak: 4 times as high with four times the rows, whatever its first steps are."""
    assert trained(launch(source(ADAM + LAMBDA), "--batch-size=64", *ALL)) == {"trained": [64, 8], "one": [0.02, 0]}


@pytest.mark.exhaustive
def test_the_weight_decay_follows_where_its_option_is_named(launch):
    text = source(ADAM.replace("Adam", "AdamW").replace("rate)", "rate, weight_decay=args.wd)"))
    assert trained(launch(text, "--batch-size=64", *ALL, "--weight-decay-arg=--wd"))["one"] == [0.02, 0.2]
    unnamed = launch(text, "--batch-size=64", *ALL)
    assert "weight_decay stays 0.1 in the script: the rule would make it 0.2" in unnamed.stderr
    assert trained(unnamed)["one"] == [0.02, 0.1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("args.lr *= 3", "  the base rate of Adam: 0.02 decided, 0.06 in the run\n  the learning rate of Adam: 0.02"),
        ("args.accumulate = 2", "  the rows of each batch that the step adds up: 64 decided, 64, 64 in the run\n"),
    ],
    ids=["rate", "accumulation"],
)
@pytest.mark.exhaustive(but=["rate"])
def test_the_run_is_held_against_the_rehearsal(launch, change, said):
    """A script that does something else where it is not planned: an error before its first step."""
    first = f"import trainingcompiler.planning.planner as planner\nif planner.current is None: {change}"
    done = launch(source(first=first), "--batch-size=64", *ALL)
    assert done.returncode == 2 and "trained" not in done.stdout
    start = (
        "trainingcompiler: the first step is not the one that was decided and rehearsed, and nothing has been trained:"
    )
    assert f"{start}\n{said}" in done.stderr


ASKS = """
import trainingcompiler
wanted = trainingcompiler.recommendation()
if wanted is not None:
    args.bs, args.lr, args.accumulate = wanted.recipe.batch_size, {rate}, wanted.recipe.accumulation_steps
"""


@pytest.mark.exhaustive
def test_a_script_that_asks_is_held_to_what_it_was_told(launch):
    text = source(MAKE, first=ASKS.format(rate="wanted.recipe.lr"), before=BY_HAND)
    assert trained(launch(text, "--batch-size=64"))["one-cycle"] == [near(0.02), 0]
    refused = launch(source(first=ASKS.format(rate="0.01")), "--batch-size=64")
    assert refused.returncode == 2 and "trained" not in refused.stdout
    assert "  the learning rate of Adam: 0.02 decided, 0.01 in the script\n" in refused.stderr
    assert "The script asks trainingcompiler.recommendation(): have it use what that says for all of" in refused.stderr
