"""The stock Trainer under `enable()`: the same model, one program a step, no look between two logs."""

import pytest
import torch
import transformers as hf
from parity import assert_same, train
from tasks import TASKS, Task, gpt2
from torch import nn
from training import assert_same_trainer, losses, trainer

from trainingcompiler.reporting.events import Note, Recompiled

STEPS, LOGS = 30, 6
BERT = TASKS["bert"]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.exhaustive(but=["gpt2", "vit", "llama with lora"])
def test_thirty_steps_with_accumulation(task, tmp_path):
    run = assert_same_trainer(TASKS[task], tmp_path, gradient_accumulation_steps=2)
    counts = run.statistics
    assert (counts.steps, counts.compiles) == (STEPS, 2)
    assert counts.eager_steps <= 1  # a first forward may write config.problem_type, and then runs in torch
    assert counts.launches == 2 * counts.compiled_steps  # one for each micro-batch, the step in the last
    assert counts.host_reads <= 2 * LOGS  # the loss and the norm, where they are logged


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_grad_norm": 0.0, "weight_decay": 0.1, "adam_epsilon": 1e-6},
        {"label_smoothing_factor": 0.1},
        {"activation_checkpointing": True},
        {"optim": "sgd", "learning_rate": 0.1},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_one_program_a_step(options, tmp_path):
    run = assert_same_trainer(TASKS["gpt2"], tmp_path, dtype=torch.float64, max_steps=10, warmup_steps=2, **options)
    assert run.statistics.compiles == 1
    assert run.statistics.launches == run.statistics.compiled_steps == 10
    assert run.statistics.host_reads <= 2 * 2


def test_bf16(tmp_path):
    """bfloat16 rounds at 8 bits: one program, and losses within what it rounds."""

    def loop(objects, data):
        made = trainer(objects, data, tmp_path, max_steps=10, bf16=True)
        made.train()
        return losses(made)

    eager, run = (train(lambda: {"model": gpt2()}, loop, TASKS["gpt2"].data(), compiled=c) for c in (False, True))
    assert not run.fallbacks() and run.statistics.launches == run.statistics.compiled_steps == 10
    assert run.observed == pytest.approx(eager.observed, rel=2**-8)
    assert all(parameter.dtype == torch.float32 for parameter in run.objects["model"].parameters())


def test_fp16_on_a_cpu_is_float32_and_says_so(tmp_path):
    def loop(objects, data):
        made = trainer(objects, data, tmp_path, max_steps=3, fp16=True)
        made.train()
        return losses(made)

    run = train(lambda: {"model": gpt2()}, loop, TASKS["gpt2"].data(), compiled=True)
    assert [event.text for event in run.events if isinstance(event, Note)] == [
        "fp16=True has no effect on a CPU, where Accelerate trains in float32; bf16=True has"
    ]


class Line(nn.Module):
    """The smallest model that the Trainer can train."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def forward(self, x, labels):
        return {"loss": (self.linear(x) - labels).pow(2).mean()}


def _points(generator):
    x = torch.rand(2, generator=generator) * 0.9
    return {"x": x, "labels": x.sum(0, keepdim=True)}


def test_no_scheduler_recompiles(tmp_path):
    kwargs = {
        "cosine_with_min_lr": {"min_lr": 1e-5},
        "cosine_warmup_with_min_lr": {"min_lr": 1e-5},
        "warmup_stable_decay": {"num_decay_steps": 3},
        "reduce_lr_on_plateau": {},
    }
    for kind in hf.SchedulerType:
        by_metric = kind in ("reduce_lr_on_plateau", "greedy")
        evaluates = {"eval_strategy": "steps", "eval_steps": 4} if by_metric else {}

        def loop(objects, data, kind=kind, evaluates=evaluates):
            made = trainer(
                objects, data, tmp_path, max_steps=9, warmup_steps=2, lr_scheduler_type=kind, logging_steps=3,
                lr_scheduler_kwargs=kwargs.get(kind, {}), trainer={"eval_dataset": data[:8]}, **evaluates,
            )  # fmt: skip
            made.train()
            return losses(made) + [log["learning_rate"] for log in made.state.log_history if "learning_rate" in log]

        data = Task(Line, _points).data()
        eager, run = (train(lambda: {"model": Line()}, loop, data, compiled=c) for c in (False, True))
        assert_same(eager, run, eager)
        assert not run.fallbacks() and run.statistics.compiles == 1 + bool(evaluates), kind


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def test_evaluation_best_model_and_early_stopping(tmp_path):
    seen = []

    class Noting(hf.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(state.global_step)

    def use(made):
        made.train()
        made.evaluate()
        predicted = made.predict(made.eval_dataset)
        made.state.log_history.append({"loss": float(abs(predicted.predictions).sum())})

    data = BERT.data()
    run = assert_same_trainer(
        BERT, tmp_path, use, max_steps=20, eval_strategy="steps", eval_steps=5, save_strategy="steps", save_steps=5,
        save_total_limit=2, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=False,
        trainer={
            "eval_dataset": data[:8], "compute_metrics": accuracy,
            "callbacks": [Noting(), hf.EarlyStoppingCallback(early_stopping_patience=2)],
        },
    )  # fmt: skip
    assert run.statistics.compiles == 2 and run.statistics.eager_steps == 0  # the step, and the evaluation
    assert seen and not [event for event in run.events if isinstance(event, Recompiled)]


class Exploding(Line):
    """Its loss is infinite where the data say so."""

    def forward(self, x, labels):
        return {"loss": (self.linear(x) - labels).pow(2).mean() + (x[:, 1] / (1 - x[:, 0]) * 1e-3).mean().detach()}


@pytest.mark.parametrize("filtered", [True, False])
def test_a_loss_that_is_not_finite_is_left_out_of_the_log_without_a_look(filtered, tmp_path):
    def example(generator):
        if torch.rand((), generator=generator) < 0.1:
            return {"x": torch.tensor([1.0, 0.5]), "labels": torch.tensor([1.5])}
        return _points(generator)

    def loop(objects, data):
        made = trainer(objects, data, tmp_path, max_steps=20, logging_steps=4, logging_nan_inf_filter=filtered)
        made.train()
        return losses(made)

    data = Task(Exploding, example).data()
    eager, run = (train(lambda: {"model": Exploding()}, loop, data, compiled=c) for c in (False, True))
    assert run.observed == pytest.approx(eager.observed, rel=1e-4, nan_ok=True)
    assert all(map(torch.isfinite, torch.tensor(run.observed))) == filtered
    assert run.statistics.launches == run.statistics.compiled_steps == 20


def test_generating_in_an_evaluation_is_left_to_torch(tmp_path):
    def loop(objects, data):
        arguments = hf.Seq2SeqTrainingArguments(
            str(tmp_path), max_steps=4, per_device_train_batch_size=4, report_to=[], save_strategy="no",
            disable_tqdm=True, use_cpu=True, predict_with_generate=True, generation_max_length=6, logging_steps=2,
        )  # fmt: skip
        made = hf.Seq2SeqTrainer(objects["model"], arguments, train_dataset=data, eval_dataset=data[:8])
        made.remove_callback(hf.PrinterCallback)
        made.train()
        return [*losses(made), made.evaluate()["eval_loss"], float(made.predict(data[:8]).predictions.sum())]

    task = TASKS["t5"]
    eager, run = (train(lambda: {"model": task.model()}, loop, task.data(), compiled=c) for c in (False, True))
    assert_same(eager, run, eager)
    # The step, and the loss of an evaluation, twice: `generate` writes its defaults into the model's configuration.
    assert not run.fallbacks() and run.statistics.compiles <= 3
    assert run.statistics.launches <= 3 + 2 * 2
