"""`python -m trainingcompiler.check`: the verdict on a step, and what it says when there is nothing to judge."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from small import batches, made, mlp, train_on

import trainingcompiler as tc
from trainingcompiler.frameworks.pytorch.capture import inspection
from trainingcompiler.frameworks.pytorch.operators import LOWERINGS
from trainingcompiler.frameworks.pytorch.verify.compare import check

SCRIPT = """
import torch
from torch import nn
from torch.nn import functional as F
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 4))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
for _ in range(6):
    x, y = torch.randn(16, 8), torch.randint(0, 4, (16,))
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.item()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
"""


def run(folder: Path, script: str, *words: str) -> subprocess.CompletedProcess:
    path = folder / "train.py"
    path.write_text(textwrap.dedent(script))
    return subprocess.run(
        [sys.executable, "-m", "trainingcompiler.check", *words, str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(folder / "cache")},
    )


def inspect_one(model=mlp, optimizer=torch.optim.AdamW):
    """The inspections of a short training run."""
    seen = []
    inspection.inspector = seen.append
    tc.enable(tc.TrainingCompilerConfig(engine="xla", fallback="error", quiet=True, verify="off"))
    try:
        objects = made(model, optimizer, lr=0.01)()
        train_on(objects["model"], objects["optimizer"], batches(3))
    finally:
        inspection.inspector = None
        tc.disable()
    return seen


def test_a_step_that_is_right(tmp_path):
    done = run(tmp_path, SCRIPT, "--steps=2")
    assert done.returncode == 0, done.stderr
    assert "[check]      equal up to rounding" in done.stderr
    assert "step 2 at train.py:11: 2 programs, values read by the script: 1" in done.stderr
    assert "operators without a lowering: none" in done.stderr


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_every_result_is_compared(optimizer):
    *_, last = inspect_one(optimizer=optimizer)
    verdict = check(last)
    assert verdict.first is None and not verdict.over
    assert verdict.compared == len(last.results) > 6
    assert any(name.startswith("new 0.weight") for name in last.names.values())


def test_a_wrong_operator_is_found_by_name_line_and_values(monkeypatch):
    right = LOWERINGS["aten.tanh.default"]
    monkeypatch.setitem(LOWERINGS, "aten.tanh.default", lambda x: right(x) + jnp.where(x > 0, 1e-2, 0).astype(x.dtype))
    *_, last = inspect_one()
    verdict = check(last)
    assert verdict.first is not None and verdict.over
    assert verdict.first.operator == "aten.tanh.default"
    assert verdict.first.where.startswith("small.py:")
    assert verdict.first.compiled == pytest.approx(verdict.first.torchs + 1e-2, abs=1e-6)


def test_a_wrong_result_of_the_executable_is_a_difference():
    *_, last = inspect_one()
    number = next(iter(last.names))
    last.results[number] = np.asarray(last.results[number]) * 1.5
    verdict = check(last)
    assert verdict.over == [last.names[number]] and verdict.largest[0] > 0.3


def test_a_difference_is_exit_code_1(tmp_path):
    spoiled = """
    import trainingcompiler.frameworks.pytorch.operators as table
    right = table.LOWERINGS["aten.relu.default"]
    table.LOWERINGS["aten.relu.default"] = lambda x: right(x) * 1.01
    """
    done = run(tmp_path, textwrap.dedent(spoiled) + SCRIPT)
    assert done.returncode == 1, done.stderr
    assert "the first operator at fault is aten.relu.default at train.py:" in done.stderr


EVALUATING = """
import torch
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
for _ in range(4):
    optimizer.zero_grad()
    model(torch.randn(16, 8)).square().mean().backward()
    optimizer.step()
model.eval()
with torch.no_grad():
    print(model(torch.ones(2, 8)).sum().item())
print("not reached")
"""


def test_evaluations_are_looked_at(tmp_path):
    done = run(tmp_path, EVALUATING, "--steps=3")
    assert done.returncode == 0, done.stderr
    assert "[check]      step 3 at train.py:" in done.stderr and "[check]      evaluation: " in done.stderr
    assert "not reached" not in done.stdout


def test_a_wrong_evaluation_is_a_difference(tmp_path):
    spoiled = """
    import trainingcompiler.frameworks.pytorch.operators as table
    right = table.LOWERINGS["aten.relu.default"]
    table.LOWERINGS["aten.relu.default"] = lambda x: right(x) * 1.01
    """
    evaluating = EVALUATING.replace("model.eval()", "model[1] = nn.ReLU(); model.eval()")
    done = run(tmp_path, textwrap.dedent(spoiled) + evaluating, "--steps=3")
    assert done.returncode == 1, done.stderr
    assert "the first operator at fault is aten.relu.default at train.py:" in done.stderr


@pytest.mark.parametrize("value", [3.6e272, np.nan, np.inf])
def test_what_only_the_whole_program_has_wrong_is_never_rounding(value):
    *_, last = inspect_one()
    number = next(iter(last.names))
    spoiled = np.array(last.results[number])
    spoiled.reshape(-1)[0] = value if spoiled.dtype == np.float64 else np.float32(min(value, 3e38))
    last.results[number] = spoiled
    verdict = check(last)
    assert verdict.differs and verdict.first is None
    _, torchs, compiled, name = verdict.worst
    assert np.isfinite(torchs) and not abs(compiled) < 1e38 and name == last.names[number]


UNKNOWN = """
def operator(name):
    @torch.library.custom_op(f"check_tests::{name}", mutates_args=(), device_types="cpu")
    def run(x: torch.Tensor) -> torch.Tensor:
        return x * 1.0
    run.register_fake(torch.empty_like)
    return run
inner, outer, behind = map(operator, ("inner", "outer", "behind"))
outer.register_autograd(lambda _, gradient: behind(gradient))
inner.register_autograd(lambda _, gradient: gradient)
"""


def test_every_operator_without_a_lowering_is_listed(tmp_path):
    """Those of forward, of the loss and of backward, each with its line; two steps in torch are enough to know."""
    body = SCRIPT.replace("model(x)", "outer(inner(model(x)).relu())").replace("range(6)", "range(1000)")
    head, tail = body.split("torch.manual_seed(0)")
    done = run(
        tmp_path,
        head + UNKNOWN + "torch.manual_seed(0)" + tail.replace("optimizer.step()", "print(_); optimizer.step()"),
        "--steps=2",
    )
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    texts = (tmp_path / "train.py").read_text().splitlines()
    call, look, behind = (
        f"train.py:{next(number for number, text in enumerate(texts, 1) if words in text)}"
        for words in ("outer(inner", "loss.item()", "behind(gradient)")
    )
    start = lines.index("[check]      operators without a lowering: 3")
    assert {line.removeprefix("[check]        ") for line in lines[start + 1 : start + 4]} == {
        f"check_tests.inner.default at {call}",
        f"check_tests.outer.default at {call}",
        f"check_tests.behind.default at {behind}",
    }
    assert "the step is no program: it runs eagerly; values read by the script: 1" in done.stderr
    assert lines[-1] == f"[check]      nothing to check: the step could not be captured ({look})"
    assert len(done.stdout.split()) < 5  # of 1000: torch has shown what it can


FAILING = SCRIPT.replace("loss.backward()", "raise KeyError('lost')")
NOTHING = {
    "no training": ("print('hello')", "train.py reached no optimizer.step()"),
    "one step": (
        SCRIPT.replace("range(6)", "range(1)").replace("optimizer.zero_grad()", ""),
        "train.py ended before its first compiled step",
    ),
    "a failure": (FAILING, "before its first compiled step the script failed at train.py:13 (KeyError: 'lost')"),
    "a late failure": (
        SCRIPT.replace("loss.backward()", "loss.backward(); 1 / (2 - _)"),
        "after 2 compiled steps the script failed at train.py:13 (ZeroDivisionError: division by zero)",
    ),
    "an exit": ("import sys; sys.exit(3)", "before its first compiled step the script left with exit code 3"),
    "no syntax": ("x = (", "the script failed at train.py:1 (SyntaxError: '(' was never closed (train.py, line 1))"),
    "no capture": (
        SCRIPT.replace("model(x)", "model(x)[x.sum(1) > 0]").replace(", y)", ", y[x.sum(1) > 0])"),
        "the step could not be captured (train.py:",
    ),
}


@pytest.mark.parametrize(("script", "says"), NOTHING.values(), ids=NOTHING)
@pytest.mark.exhaustive(but=["no training", "a late failure", "no capture"])
def test_nothing_to_check(script, says, tmp_path):
    done = run(tmp_path, script)
    assert done.returncode == 2, done.stderr
    assert says in done.stderr


def test_no_such_module(tmp_path):
    words = [sys.executable, "-m", "trainingcompiler.check", "-m", "no_such_module"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and "there is no module no_such_module" in done.stderr
    assert "optimizer.step" not in done.stderr


@pytest.mark.parametrize("words", [["--steps=0"], ["--steps", "x"], ["--setps=2"]])
def test_bad_words(words, tmp_path):
    done = run(tmp_path, SCRIPT, *words)
    assert done.returncode == 2 and done.stderr.startswith("trainingcompiler.check: --s")
