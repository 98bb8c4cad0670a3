"""Length buckets: what is padded, what is not, and that the trained model is that of the unpadded batches."""

import pytest
import torch
import transformers as hf
from parity import assert_same, train
from tasks import VOCABULARY, Task, bert, gpt2, words
from torch import nn
from torch.nn import functional as F
from training import assert_same_trainer, losses, trainer

from trainingcompiler.frameworks.huggingface.buckets import Buckets, geometric, waste
from trainingcompiler.reporting.events import Note


def of_any_length(label):
    """An example of 5 to 40 tokens."""

    def example(generator):
        ids = words(generator, int(torch.randint(5, 41, (), generator=generator)))
        return {"input_ids": ids.tolist(), "labels": label(ids)}

    return example


def collate(rows):
    """Pads to the longest row, as transformers' own collators do."""
    length = max(len(row["input_ids"]) for row in rows)
    ids = [row["input_ids"] for row in rows]
    batch = {
        "input_ids": torch.tensor([one + [2] * (length - len(one)) for one in ids]),
        "attention_mask": torch.tensor([[1] * len(one) + [0] * (length - len(one)) for one in ids]),
    }
    labels = [row["labels"] for row in rows]
    if isinstance(labels[0], list):
        labels = [one + [-100] * (length - len(one)) for one in labels]
    return {**batch, "labels": torch.tensor(labels)}


def notes(run):
    return [event.text for event in run.events if isinstance(event, Note)]


CLASSES = of_any_length(lambda ids: int(ids[0]) % 3)
SEVERAL = {
    "gpt2": Task(gpt2, of_any_length(lambda ids: ids.tolist())),
    "bert": Task(bert, CLASSES),
}


@pytest.mark.parametrize("task", SEVERAL)
@pytest.mark.exhaustive(but=["gpt2"])
def test_few_programs_and_the_same_model(task, tmp_path):
    options = {"trainer": {"data_collator": collate}, "max_steps": 20}
    run = assert_same_trainer(SEVERAL[task], tmp_path, **options)
    (note,) = notes(run)
    assert note.startswith("batches are padded to 4 lengths, 16, 24, 32, 40: ")
    assert note.endswith("losses are those of the unpadded batches")
    assert run.statistics.compiles <= 4 and run.statistics.eager_steps <= 1


def test_predictions_come_back_without_padding(tmp_path, task="gpt2"):
    """Few programs in an evaluation that wants predictions too; their shapes are those of the unpadded batches."""
    shapes: dict[bool, list] = {True: [], False: []}

    def loop(objects, data, compiled):
        def metrics(prediction):
            shapes[compiled].append((prediction.predictions.shape, prediction.label_ids.shape))
            right = prediction.predictions.argmax(-1) == prediction.label_ids
            return {"accuracy": float(right[prediction.label_ids != -100].mean())}

        given = {"data_collator": collate, "eval_dataset": data[:32], "compute_metrics": metrics}
        made = trainer(objects, data, tmp_path, max_steps=3, trainer=given)
        made.train()
        found = made.evaluate()
        predicted = made.predict(data[:8]).predictions
        shapes[compiled].append(predicted.shape)
        return [found["eval_loss"], found["eval_accuracy"], float(abs(predicted).sum())]

    data = SEVERAL[task].data()
    eager, run = (
        train(lambda: {"model": SEVERAL[task].model()}, lambda o, d, c=c: loop(o, d, c), data, compiled=c)
        for c in (False, True)
    )
    assert shapes[True] == shapes[False] != []
    assert_same(eager, run, eager)
    assert run.statistics.compiles <= 2 * 4 and not run.fallbacks()


class Averaging(nn.Module):
    """Forgets the mask, so that padding changes it."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.head(self.words(input_ids).mean(1))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Normalizing(Averaging):
    """Padding would change its statistics in training."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)


class OwnLoss(hf.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]


class OwnStep(hf.Trainer):
    def training_step(self, *args, **kwargs):
        return super().training_step(*args, **kwargs)


@pytest.mark.parametrize(
    ("model", "kind", "reason"),
    [
        (Averaging, hf.Trainer, "padding changes what the model computes"),
        (Normalizing, hf.Trainer, "the model has batch normalization"),
        (Averaging, OwnLoss, "the loss is computed by code of your own"),
        (Averaging, OwnStep, "the loss is computed by code of your own"),
    ],
)
def test_where_padding_may_change_the_loss_each_length_is_a_program(model, kind, reason, tmp_path):
    def loop(objects, data):
        made = trainer(objects, data, tmp_path, max_steps=6, trainer={"data_collator": collate}, kind=kind)
        made.train()
        return losses(made)

    data = Task(model, CLASSES).data(24)
    eager = train(lambda: {"model": model()}, loop, data, compiled=False)
    run = train(lambda: {"model": model()}, loop, data, compiled=True)
    (note,) = notes(run)
    assert reason in note and "each length is compiled once" in note
    assert_same(eager, run, eager)
    assert not run.fallbacks()


def test_looking_at_the_data_draws_no_random_numbers(tmp_path):
    """Otherwise a compiled run would see its data in another order than an eager one."""
    seen = {True: [], False: []}

    def loop(objects, data, compiled):
        class Noting(hf.TrainerCallback):
            def on_train_begin(self, *_, **__):
                self.training = True

        def noted(rows):
            if noting.training:
                seen[compiled].append([row["input_ids"][0] for row in rows])
            return collate(rows)

        noting = Noting()
        noting.training = False
        made = trainer(objects, data, tmp_path, max_steps=4, trainer={"data_collator": noted, "callbacks": [noting]})
        made.train()
        return []

    data = SEVERAL["bert"].data()
    for compiled in (False, True):
        train(lambda: {"model": bert()}, lambda o, d, c=compiled: loop(o, d, c), data, compiled=compiled)
    assert seen[True] == seen[False] != []


def test_lengths_are_geometric_and_end_at_the_longest():
    assert geometric(100) == (16, 24, 32, 48, 64, 96, 100)
    assert geometric(100, coarse=True) == (16, 32, 64, 100)
    assert geometric(16) == (16,) and geometric(7) == (7,)


def test_what_is_padded_with_what():
    buckets = Buckets(lengths=(8, 16), pad_id=5, labels_differ=False)
    ids = torch.ones(2, 6, dtype=torch.int64)
    batch = {"input_ids": ids, "attention_mask": ids, "token_type_ids": ids, "labels": ids, "weights": torch.ones(2)}
    padded = buckets.pad(batch)
    assert {name: value.tolist()[0][6:] for name, value in padded.items() if value.ndim == 2} == {
        "input_ids": [5, 5], "attention_mask": [0, 0], "token_type_ids": [0, 0], "labels": [-100, -100],
    }  # fmt: skip
    assert padded["weights"] is batch["weights"] and batch["input_ids"].shape == (2, 6)
    classes = {"input_ids": ids, "labels": torch.ones(2, 3, dtype=torch.int64)}
    assert buckets.pad(classes)["labels"].shape == (2, 3)  # a label for each class, not for each token
    long = {"input_ids": torch.ones(2, 17, dtype=torch.int64)}
    assert buckets.pad(long)["input_ids"].shape == (2, 17)
    assert buckets.unknown({**batch, "position_ids": ids}) == "position_ids" and buckets.unknown(batch) is None
    assert buckets.pad("no batch") == "no batch"


def test_waste_is_the_share_of_padding():
    buckets = Buckets(lengths=(8,), pad_id=0, labels_differ=False)
    before, after = waste([4, 4, 4, 4], 2, buckets)
    assert (before, after) == (0.0, 0.5)
