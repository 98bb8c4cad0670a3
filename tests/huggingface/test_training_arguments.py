"""The flag: what it turns on, for whom, and what it excludes."""

import pytest
import transformers as hf
from parity import train
from tasks import TASKS
from training import trainer

import trainingcompiler as tc
from trainingcompiler.frameworks import huggingface, pytorch
from trainingcompiler.frameworks.huggingface import Seq2SeqTrainingArguments, TrainingArguments
from trainingcompiler.reporting.statistics import current as statistics

QUIET = dict(report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True, max_steps=4, logging_steps=2)


@pytest.fixture(autouse=True)
def _off_afterwards(monkeypatch):
    monkeypatch.setenv("TRAININGCOMPILER_ENGINE", "xla")
    monkeypatch.setenv("TRAININGCOMPILER_QUIET", "1")
    yield
    tc.disable()


def trained(arguments) -> int:
    """Trains with the stock Trainer; returns how many steps were compiled."""
    before = statistics().compiled_steps
    task = TASKS["bert"]
    made = hf.Trainer(task.model(), arguments, train_dataset=task.data(16))
    made.remove_callback(hf.PrinterCallback)
    made.train()
    return statistics().compiled_steps - before


def test_being_imported_is_not_being_active(tmp_path):
    assert trained(TrainingArguments(str(tmp_path), **QUIET)) == 0
    assert pytorch.current_session() is None and huggingface._hooks is None


def test_the_flag_compiles_the_stock_trainer_and_no_other(tmp_path):
    plain = hf.TrainingArguments(str(tmp_path), **QUIET)
    flagged = TrainingArguments(str(tmp_path), training_compiler=True, **QUIET)
    assert trained(flagged) == 4
    assert trained(plain) == 0 and trained(TrainingArguments(str(tmp_path), **QUIET)) == 0
    tc.disable()
    assert hf.Trainer.train.__module__ == "transformers.trainer" and pytorch.current_session() is None


def test_what_enable_has_turned_on_holds_for_every_trainer(tmp_path):
    tc.enable()
    TrainingArguments(str(tmp_path), training_compiler=True, **QUIET)
    assert trained(hf.TrainingArguments(str(tmp_path), **QUIET)) == 4


@pytest.mark.parametrize("kind", [TrainingArguments, Seq2SeqTrainingArguments])
def test_the_command_line_has_the_flag(kind, tmp_path):
    parser = hf.HfArgumentParser(kind)
    words = ["--output_dir", str(tmp_path), "--use_cpu"]
    (plain,) = parser.parse_args_into_dataclasses(words)
    assert plain.training_compiler is False and pytorch.current_session() is None
    (flagged,) = parser.parse_args_into_dataclasses([*words, "--training_compiler"])
    assert flagged.training_compiler is True and pytorch.current_session() is not None
    assert "--training_compiler" in parser.format_help()


CONFLICTS = {
    "torch_compile": (True, "the whole step is compiled"),
    "deepspeed": ({"zero_optimization": {"stage": 1}}, "--no-compile"),
    "fsdp": ("full_shard", "--no-compile"),
    "auto_find_batch_size": (True, "set per_device_train_batch_size"),
    "use_liger_kernel": (True, "XLA fuses operators itself"),
}


@pytest.mark.parametrize("name", CONFLICTS)
def test_a_conflict_is_an_error_before_training(name, tmp_path):
    """Set on finished arguments: some of these options ask for packages that are not installed."""
    value, cure = CONFLICTS[name]
    arguments = TrainingArguments(str(tmp_path), training_compiler=True, **QUIET)
    task = TASKS["bert"]
    made = hf.Trainer(task.model(), arguments, train_dataset=task.data(16))
    setattr(arguments, name, value)
    before = statistics().steps
    with pytest.raises(tc.UsageError) as caught:
        made.train()
    assert f"{name}={value!r}" in str(caught.value) and cure in str(caught.value)
    assert statistics().steps == before


def test_a_conflict_in_the_arguments_is_an_error_at_once(tmp_path):
    with pytest.raises(tc.UsageError, match="auto_find_batch_size=True"):
        TrainingArguments(str(tmp_path), training_compiler=True, auto_find_batch_size=True, **QUIET)
    assert pytorch.current_session() is None
    TrainingArguments(
        str(tmp_path), auto_find_batch_size=True, **QUIET
    )  # without the flag it is the Trainer's business


def test_off_in_the_environment_wins(monkeypatch, tmp_path):
    monkeypatch.setenv("TRAININGCOMPILER", "0")
    assert trained(TrainingArguments(str(tmp_path), training_compiler=True, **QUIET)) == 0


def test_a_run_leaves_the_trainer_as_it_was(tmp_path):
    def loop(objects, data):
        made = trainer(objects, data, tmp_path, max_steps=3)
        made.train()
        assert not {"training_step", "prediction_step"} & set(vars(made))
        return []

    task = TASKS["bert"]
    train(lambda: {"model": task.model()}, loop, task.data(16), compiled=True)
