"""`trainingcompiler.plan` for GPUs that are not there."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from trainingcompiler.planning.search import MOST_COMPILES
from trainingcompiler.targets.gpus import GPUS

pytestmark = pytest.mark.gpu_plan
CHAR_GPT = Path(__file__).parents[2] / "examples" / "pytorch" / "char_gpt.py"


def plan(folder: Path, *options: str, script: Path = CHAR_GPT) -> dict:
    """The plan of a script, by default of the small GPT."""
    path = folder / "plan.json"
    command = [sys.executable, "-m", "trainingcompiler.plan", *options, "--json", str(path), str(script)]
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


def test_several_gpus_divide_the_state_and_send(tmp_path):
    (one,) = plan(tmp_path, "--gpu=h100", "--batch-sizes=64")["batches"]
    divided = plan(tmp_path, "--gpu=h100", "--gpus=8", "--batch-sizes=64")
    (copied,) = plan(tmp_path, "--gpu=h100", "--gpus=8", "--strategy=dp", "--batch-sizes=64")["batches"]
    assert divided["device"] == "8 x NVIDIA H100 80GB HBM3, fsdp"
    (batch,) = divided["batches"]
    state = {name: found["parameter_bytes"] + found["optimizer_bytes"] for name, found in
             {"one": one, "divided": batch, "copied": copied}.items()}  # fmt: skip
    assert state["copied"] == state["one"] and state["one"] / 8 <= state["divided"] < 1.1 * state["one"] / 8
    assert batch["flops"] == copied["flops"] == one["flops"] / 8
    sent = {found["kind"]: found["size_bytes"] for found in batch["collectives"]}
    assert sent["all-gather"] > 0 and sent["reduce-scatter"] + sent.get("all-reduce", 0) > 0
    # Under dp gradients are added up once, and nothing but them: float32, one for each parameter.
    added = {found["kind"]: found["size_bytes"] for found in copied["collectives"]}
    assert "reduce-scatter" not in added and added["all-reduce"] == pytest.approx(one["parameter_bytes"], rel=0.05)


LLAMA = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

model = LlamaForCausalLM(LlamaConfig(use_cache=False))
assert sum(p.numel() for p in model.parameters()) > 6.7e9
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
ids = torch.zeros(8, 2048, dtype=torch.int64)
for step in range(2):
    optimizer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
"""


@pytest.mark.parametrize(("gpus", "rows"), [(8, 8), (64, 64)])
def test_seven_billion_parameters_take_no_memory_to_plan(tmp_path, gpus, rows):
    script = tmp_path / "llama.py"
    script.write_text(LLAMA)
    options = ("--gpu=h200", f"--gpus={gpus}", f"--batch-sizes={rows}")
    (batch,) = plan(tmp_path, *options, script=script)["batches"]
    state = batch["parameter_bytes"] + batch["optimizer_bytes"]
    assert state == pytest.approx(12 * 6.738e9 / gpus, rel=0.01) and batch["fits"]
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    assert children < 8e9  # the float32 weights alone would be 27e9


def test_a_batch_that_the_gpus_cannot_divide_is_refused(tmp_path):
    command = [sys.executable, "-m", "trainingcompiler.plan", "--gpu=h100", "--gpus=8", "--batch-sizes=8,12"]
    done = subprocess.run([*command, str(CHAR_GPT)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "trainingcompiler.plan: a batch of 12 cannot be divided between 8 GPUs: give sizes that are multiples of 8, "
        "--batch-sizes=8,16"
    )
