"""The examples train, as they are and under the launcher, and to the same model."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "huggingface"
LAUNCHED = ["-m", "trainingcompiler.launch", "--engine=xla", "--fallback=error"]
MINILM = ["--steps", "8", "--max-length", "12", "--batch-size", "4", "--examples", "25"]
CASES = {
    "finetune_minilm.py": (MINILM, "train_loss"),
    "accelerate_loop.py": (["--epochs", "2"], "test_accuracy"),
    "lightning_fit.py": (["--epochs", "2"], "test_accuracy"),
    "lora.py": (["--steps", "10"], "last_loss"),
}


def train(script: str, options: list[str], folder: Path, launched: bool) -> subprocess.CompletedProcess:
    """Runs an example in `folder`, with a compilation cache of its own."""
    command = [sys.executable, *(LAUNCHED if launched else []), str(EXAMPLES / script), *options]
    environment = os.environ | {"TRAININGCOMPILER_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(CASES)


@pytest.mark.parametrize("script", CASES)
@pytest.mark.exhaustive(but=["accelerate_loop.py", "lightning_fit.py", "lora.py"])
def test_an_example_is_the_same_model_under_the_launcher(script, tmp_path):
    options, name = CASES[script]
    eager, compiled = (train(script, options, tmp_path, launched) for launched in (False, True))
    values = [float(re.search(rf"^final: .*{name}=([\d.]+)", run.stdout, re.MULTILINE)[1]) for run in (eager, compiled)]
    # Four digits are printed; of 357 test images one may lie on the edge of two classes.
    assert values[1] == pytest.approx(values[0], abs=3e-3 if name == "test_accuracy" else 2e-4)
    assert "compiled: yes" in compiled.stderr and "[done]" in compiled.stderr
