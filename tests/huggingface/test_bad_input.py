"""What is wrong with a script is told in the Trainer's own words, compiled or not."""

import pytest
import torch
import transformers as hf
from parity import train
from tasks import TASKS, bert, gpt2
from torch import nn
from training import trainer


class Silent(nn.Module):
    """Returns no loss."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x):
        return {"logits": self.linear(x)}


def no_loss(folder):
    data = [{"x": torch.ones(2)}] * 8
    return lambda: trainer({"model": Silent()}, data, folder).train()


def no_columns(folder):
    data = [{"unknown": torch.ones(2)}] * 8
    return lambda: trainer({"model": bert()}, data, folder).train()


def no_tensors(folder):
    given = {"data_collator": lambda rows: {"input_ids": [row["input_ids"].tolist() for row in rows]}}
    return lambda: trainer({"model": bert()}, TASKS["bert"].data(8), folder, trainer=given).train()


def another_model(folder):
    made = trainer({"model": gpt2()}, TASKS["gpt2"].data(8), folder, max_steps=2, save_strategy="steps", save_steps=2)
    made.train()
    other = trainer({"model": gpt2(n_embd=32)}, TASKS["gpt2"].data(8), folder)
    return lambda: other.train(resume_from_checkpoint=str(folder / "checkpoint-2"))


def out_of_vocabulary(folder):
    data = [{**example, "input_ids": example["input_ids"] + 60} for example in TASKS["bert"].data(8)]
    return lambda: trainer({"model": bert()}, TASKS["bert"].data(8) + data, folder).train()


@pytest.mark.parametrize("case", [no_loss, no_columns, no_tensors, another_model, out_of_vocabulary])
def test_the_error_is_that_of_the_plain_trainer(case, tmp_path):
    told = {}
    for compiled in (False, True):
        made = case(tmp_path / str(compiled))

        def loop(objects, data, made=made, compiled=compiled):
            with pytest.raises(Exception) as caught:  # noqa: B017, PT011 - whatever it is, it is to be the same
                made()
            told[compiled] = type(caught.value), str(caught.value)
            return []

        train(lambda: {}, loop, [], compiled=compiled)
    assert told[True] == told[False]
    assert "xla" not in told[True][1].lower()
    assert isinstance(hf.__version__, str)
