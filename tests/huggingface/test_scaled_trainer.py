"""What the launcher recommends, in a Trainer's arguments."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
import transformers as hf

from trainingcompiler.cli import script_options as options
from trainingcompiler.frameworks.huggingface.apply_recommendation import set_arguments
from trainingcompiler.planning.batch_scaling import Recipe, rescale
from trainingcompiler.planning.recommendation import NotApplicable

SCRIPT = """
import torch
from transformers import Trainer, TrainingArguments, BertConfig, BertForSequenceClassification

class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, row):
        ids = torch.randint(1, 100, (12,), generator=torch.Generator().manual_seed(row))
        return {"input_ids": ids, "labels": int(ids[0]) % 3}

torch.manual_seed(0)
model = BertForSequenceClassification(BertConfig(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=100, num_labels=3))
arguments = TrainingArguments("out", per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=1e-3,
    warmup_steps=4, weight_decay=0.1, num_train_epochs=1, report_to="none", save_strategy="no", use_cpu=True)
trainer = Trainer(model, arguments, train_dataset=Rows())
trainer.train()
print("trained", arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps,
      arguments.learning_rate, arguments.warmup_steps, arguments.weight_decay, trainer.state.global_step)
"""


def arguments(tmp_path, **options) -> hf.TrainingArguments:
    plain = dict(per_device_train_batch_size=8, learning_rate=1e-3, weight_decay=0.1, report_to=[], use_cpu=True)
    return hf.TrainingArguments(str(tmp_path), **{**plain, **options})


def recipe(**more) -> Recipe:
    return Recipe(batch_size=8, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.999), epsilon=1e-8, **more)


@pytest.mark.parametrize(
    ("size", "trained"),
    [
        ("keep-global", "trained 8 1 0.001 4 0.1 8"),
        ("32", f"trained 32 1 {1e-3 * 2} 1 {0.1 * 2} 2"),  # four times the global batch: sqrt, a quarter of the steps
    ],
)
@pytest.mark.exhaustive(but=["32-trained 32 1 0.002 1 0.2 2"])
def test_a_script_is_trained_with_another_batch(tmp_path, size, trained):
    (tmp_path / "train.py").write_text(SCRIPT)
    environment = {**os.environ, "TRAININGCOMPILER_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "trainingcompiler.launch", f"--batch-size={size}", "train.py"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == trained


def test_the_whole_adam_rule(tmp_path):
    made = arguments(tmp_path, max_steps=100, warmup_steps=10)
    scaled = rescale(recipe(warmup_steps=10, total_steps=100), batch_size=32, policy="adam")
    set_arguments(made, scaled)
    assert (made.adam_beta1, made.adam_beta2) == pytest.approx((0.6, 0.996))
    assert made.adam_epsilon == pytest.approx(5e-9) and made.learning_rate == pytest.approx(2e-3)
    assert (made.max_steps, made.warmup_steps) == (25, 3)
    set_arguments(made, scaled)  # arguments of a second Trainer are not changed twice
    assert made.max_steps == 25


def test_a_share_of_the_steps_stays_a_share(tmp_path):
    made = arguments(tmp_path, max_steps=100, warmup_steps=0.1)
    set_arguments(made, rescale(recipe(warmup_steps=10, total_steps=100), batch_size=32))
    assert made.warmup_steps == 0.1


def test_a_trainer_with_another_batch_is_left(tmp_path):
    made = arguments(tmp_path, per_device_train_batch_size=2)
    set_arguments(made, rescale(recipe(), batch_size=32))
    assert (made.per_device_train_batch_size, made.learning_rate) == (2, 1e-3)


def test_what_the_arguments_do_not_hold(tmp_path):
    scaled = rescale(recipe(), batch_size=32)
    with pytest.raises(NotApplicable, match="without args=, which would hold the batch size. Either leave it"):
        set_arguments(None, scaled)
    own = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    with pytest.raises(NotApplicable, match="the script makes its own optimizer, whose learning rate"):
        set_arguments(arguments(tmp_path), scaled, own_optimizer=own)
    kept = arguments(tmp_path)
    set_arguments(kept, rescale(recipe(), batch_size=32, policy="none"), own_optimizer=own)
    assert kept.per_device_train_batch_size == 32


def launched(tmp_path, source: str, *options: str) -> subprocess.CompletedProcess:
    """Launches a script; returns the finished process."""
    (tmp_path / "train.py").write_text(source)
    environment = {**os.environ, "TRAININGCOMPILER_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "trainingcompiler.launch", *options, "train.py"]
    return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)


def test_the_groups_of_a_trainers_own_are_compared(tmp_path):
    """A head at ten times the rate follows; one with a rate of its own is an error before the first step."""
    own = """
class Grouped(Trainer):
    def create_optimizer(self, *rest):
        head = list(self.model.classifier.parameters())
        groups = [{"params": self.model.bert.parameters()}, {"params": head, "lr": RATE}]
        self.optimizer = torch.optim.AdamW(groups, lr=self.args.learning_rate, weight_decay=self.args.weight_decay)
        return self.optimizer

    def training_step(self, *rest, **more):
        self.rates = self.lr_scheduler.base_lrs
        return super().training_step(*rest, **more)

trainer = Grouped("""
    source = SCRIPT.replace("trainer = Trainer(", own) + "print('rates', *trainer.rates)\n"
    done = launched(tmp_path, source.replace("RATE", "10 * self.args.learning_rate"), "--batch-size=32")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "rates 0.002 0.02"
    done = launched(tmp_path, source.replace("RATE", "0.01"), "--batch-size=32")
    assert done.returncode == 2 and "trained" not in done.stdout
    assert "  the learning rate of AdamW's group 1: 0.02 decided, 0.01 in the script\n" in done.stderr
    assert "The Trainer's arguments have been changed, and the script sets these itself" in done.stderr


def test_what_transformers_makes_of_a_dataclass():
    @dataclasses.dataclass
    class Own:
        learning_rate: float = 0.25

    with options.watched() as seen:
        hf.HfArgumentParser(Own).parse_args_into_dataclasses([])
    assert seen["--learning_rate"] == 0.25
