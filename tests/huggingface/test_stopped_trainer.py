"""A Trainer that is told to stop leaves a checkpoint from which the same command trains the same model."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from trainingcompiler.frameworks.huggingface import stopping
from trainingcompiler.reporting import events

SCRIPT = """
import argparse, json, os, signal
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

words = argparse.ArgumentParser()
words.add_argument("--tell", default="")  # a signal, which rank 1, or whoever is alone, is sent after step 6
words.add_argument("--steps", type=int, default=1000)
words.add_argument("--options", type=json.loads, default={})
given = words.parse_args()
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, n_positions=16, vocab_size=64, bos_token_id=0,
                                   eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
rows = torch.randint(0, 64, (4096, 16), generator=torch.Generator().manual_seed(1))
data = [{"input_ids": row, "labels": row} for row in rows]


def loss_of(outputs, labels, **_):
    return torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class Tell(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 6 and given.tell and os.environ.get("RANK", "1") == "1":
            os.kill(os.getpid(), getattr(signal, given.tell))


options = {"save_strategy": "steps", "save_steps": 1000000} | given.options
arguments = TrainingArguments(
    "out", per_device_train_batch_size=4, max_steps=given.steps, logging_steps=1000, report_to=[], use_cpu=True,
    disable_tqdm=True, learning_rate=1e-3, lr_scheduler_type="constant", optim="sgd", **options,
)
trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data[:8], compute_loss_func=loss_of,
                  callbacks=[Tell()])
kept = sorted(name for name in os.listdir("out")) if os.path.exists("out") else []
trainer.train(resume_from_checkpoint=bool(kept))
if os.environ.get("RANK", "0") == "0":  # one alone: two lines written at once may come out as one
    print(json.dumps([p.double().norm().item() for p in model.parameters()]), flush=True)
"""


def run(folder: Path, *words: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    folder.mkdir(exist_ok=True)
    path = folder / "script.py"
    path.write_text(SCRIPT, encoding="utf-8")
    environ = {key: value for key, value in os.environ.items() if not key.startswith("TRAININGCOMPILER")}
    environ |= {"XDG_CACHE_HOME": str(folder.parent / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "trainingcompiler.launch", "--engine=xla", "--fallback=error", *options, str(path),
         *words],
        cwd=folder, env=environ, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name.rpartition("-")[2]) for path in (folder / "out").glob("checkpoint-*"))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.exhaustive(but=["1"])
def test_the_same_command_goes_on_to_the_same_model(workers, tmp_path):
    options = ("--nproc-per-node=2", "--max-restarts=2") if workers == 2 else ()
    stopped = run(tmp_path / "parts", "--tell=SIGTERM", options=options)
    assert stopped.returncode == 75, stopped.stderr[-3000:]
    (step,) = checkpoints(tmp_path / "parts")
    why = "SIGTERM at rank 1" if workers == 2 else "SIGTERM"
    assert (
        f"[stop]       {why}: stopped after step {step} of 1000, exit code 75; the checkpoint is "
        f"{os.path.join('out', f'checkpoint-{step}')}. To go on: the same command, and "
        "trainer.train(resume_from_checkpoint=True)\n"
    ) in stopped.stderr
    assert stopped.stderr.count("[stop]") == 1
    steps = f"--steps={step + 5}"
    resumed, whole = (run(tmp_path / name, steps, options=options) for name in ("parts", "whole"))
    assert resumed.returncode == whole.returncode == 0, resumed.stderr[-3000:] + whole.stderr[-3000:]
    found, expected = (json.loads(done.stdout.splitlines()[-1]) for done in (resumed, whole))
    assert found == pytest.approx(expected, rel=1e-9)  # float64


def test_a_checkpoint_is_written_where_the_script_wants_none_and_before_an_evaluation(tmp_path):
    options = {
        "save_strategy": "no", "eval_strategy": "steps", "eval_steps": 6, "save_only_model": True, "save_total_limit": 1
    }  # fmt: skip
    stopped = run(tmp_path / "run", "--tell=SIGUSR1", f"--options={json.dumps(options)}")
    assert stopped.returncode == 75, stopped.stderr[-3000:]
    assert checkpoints(tmp_path / "run") == [6]
    assert "eval_loss" not in stopped.stdout
    assert (
        'checkpoint-6, written although save_strategy="no", without the optimizer\'s state (save_only_model=True). To'
    ) in stopped.stderr


def test_the_checkpoint_stays_where_the_best_one_would_replace_it(tmp_path):
    # At the end of all its steps the Trainer keeps the best one only, and loads it.
    options = {
        "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True,
        "save_total_limit": 1,
    }  # fmt: skip
    stopped = run(tmp_path / "run", "--tell=SIGUSR1", f"--options={json.dumps(options)}")
    assert stopped.returncode == 75, stopped.stderr[-3000:]
    assert 6 in checkpoints(tmp_path / "run") and stopped.stdout.count("eval_loss") == 2


def test_the_last_step_is_the_end_anyway(tmp_path):
    done = run(tmp_path / "run", "--tell=SIGTERM", "--steps=6")
    assert done.returncode == 0 and checkpoints(tmp_path / "run") == [6], done.stderr[-3000:]


def test_a_trainer_that_cannot_agree_with_others_trains_and_says_so(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    seen: list[events.Event] = []
    withdraw = events.subscribe(seen.append)
    with stopping.listening(SimpleNamespace(args=SimpleNamespace())):
        pass
    withdraw()
    (note,) = seen
    assert isinstance(note, events.Note)
    assert note.text.startswith(
        "SIGTERM and SIGUSR1 end this Trainer at once, without a checkpoint: WORLD_SIZE=2, and these workers were not "
    )


def test_transformers_own_way_is_left_to_it(tmp_path):
    options = json.dumps({"enable_jit_checkpoint": True})
    done = run(tmp_path / "run", "--tell=SIGTERM", "--steps=6", f"--options={options}")
    assert done.returncode == 0 and "[stop]" not in done.stderr, done.stderr[-3000:]
