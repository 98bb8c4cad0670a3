"""`trainingcompiler.plan` for GPUs that are not there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainingcompiler.gpus import GPUS
from trainingcompiler.planning import MOST_COMPILES

pytestmark = pytest.mark.gpu_plan
CHAR_GPT = Path(__file__).parents[2] / "examples" / "pytorch" / "char_gpt.py"


def plan(folder: Path, *options: str) -> dict:
    """The plan of the small GPT."""
    path = folder / "plan.json"
    command = [sys.executable, "-m", "trainingcompiler.plan", *options, "--json", str(path), str(CHAR_GPT)]
    environment = {**os.environ, "TRAININGCOMPILER_CACHE_DIR": str(folder / "cache"), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


def test_the_largest_batch_is_found_for_a_small_gpu_and_kept(tmp_path):
    found = plan(tmp_path, "--gpu", "t4")
    peaks = {batch["batch_size"]: batch["peak_bytes"] for batch in found["batches"]}
    assert len(peaks) <= MOST_COMPILES
    above = min(size for size in peaks if size > found["largest"])
    assert peaks[found["largest"]] <= found["usable_bytes"] < peaks[above]
    assert all(batch["bound_s"] > 0 for batch in found["batches"])
    assert found["fastest"] <= found["largest"]
    again = plan(tmp_path, "--gpu", "t4")
    assert again == found


@pytest.mark.parametrize("name", GPUS)
def test_every_described_gpu_compiles_a_whole_step(tmp_path, name):
    found = plan(tmp_path, "--gpu", name, "--batch-sizes", "8")
    (batch,) = found["batches"]
    assert found["device"] == GPUS[name].name and batch["fits"]
    assert batch["memory"]["alias_bytes"] >= batch["parameter_bytes"] + batch["optimizer_bytes"]
