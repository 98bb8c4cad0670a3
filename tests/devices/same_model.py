"""Trains one model on one, two and four devices in one process, and prints how far the results are apart, as JSON.

Run by `test_devices.py`, which sets JAX_NUM_CPU_DEVICES: how many devices there are is decided when JAX starts.
"""

import json
import sys
from typing import Any

import torch
import torch.nn.functional as F
from models import images, padded_text, text
from parity import assert_same, train
from torch import nn

from trainingcompiler.frameworks import pytorch as adapter

RUNS = [(2, "dp"), (2, "fsdp"), (4, "dp"), (4, "fsdp"), (2, "tp=2"), (4, "fsdp+tp=2")]
TOLERANCE = 1e-9  # float64: sums over devices differ by 1e-15 a step, and SGD does not amplify that
WIDTH = 128  # products of at least 2**14 elements, which are those that fsdp divides


class Convolutions(nn.Module):
    """A CNN with BatchNorm and dropout."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.up, self.down = nn.Linear(8 * 36, WIDTH), nn.Linear(WIDTH, 3)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.first(x))), 2).flatten(1)
        return self.down(self.drop(F.relu(self.up(x))))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=2, n_embd=WIDTH, n_head=4, n_positions=10, vocab_size=128, bos_token_id=0, eos_token_id=0,
            resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1,
        )
    )  # fmt: skip


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(
            num_hidden_layers=2, hidden_size=WIDTH, num_attention_heads=4, intermediate_size=2 * WIDTH, vocab_size=128,
            max_position_embeddings=10, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
        )
    )  # fmt: skip


def loss_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    if "x" in batch:
        return F.cross_entropy(model(batch["x"]), batch["y"])
    labels = batch.pop("labels")  # transformers' own loss is float32, whatever the model is
    logits = model(**batch).logits
    batch["labels"] = labels
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


MODELS = {"cnn": (Convolutions, images), "gpt2": (gpt2, text), "bert": (bert, padded_text)}


def loop(objects: dict[str, Any], data: list) -> list[float]:
    """Accumulates two batches, clips, steps; looks at a weight half-way, as a script may."""
    model, optimizer, seen = objects["model"], objects["optimizer"], []
    for index, batch in enumerate(data):
        loss = loss_of(model, batch) / 2
        loss.backward()
        if index % 2:
            seen.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
            optimizer.step()
            optimizer.zero_grad()
        seen.append(loss.item())
        if index == len(data) // 2:
            seen.append(next(model.parameters()).norm().item())
    objects["bytes"] = bytes_held(objects)
    return seen


def bytes_held(objects: dict[str, Any]) -> tuple[int, int]:
    """What the training state takes on the first device, and in all if each array existed once."""
    registry = adapter.current_session().programs.state
    tensors = [*objects["model"].parameters(), *(t for s in objects["optimizer"].state.values() for t in s.values())]
    arrays = [array for tensor in tensors if (array := getattr(registry.of(tensor), "_array", None)) is not None]
    return sum(array.addressable_shards[0].data.nbytes for array in arrays), sum(array.nbytes for array in arrays)


def main(name: str) -> None:
    """Trains one of `MODELS` in every way."""
    kind, batch = MODELS[name]
    generator = torch.Generator().manual_seed(1)
    data = [batch(generator) for _ in range(40)]
    torch.set_default_dtype(torch.float64)
    data = [{k: v.double() if v.is_floating_point() else v for k, v in one.items()} for one in data]

    def make() -> dict[str, Any]:
        model = kind()
        return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)}

    alone = train(make, loop, data, compiled=True)
    for devices, strategy in RUNS:
        if name == "cnn" and "tp" in strategy:
            continue
        run = train(make, loop, data, compiled=True, devices=devices, strategy=strategy)
        held, whole = run.objects["bytes"]
        verdict = "same"
        try:
            assert not run.fallbacks(), run.fallbacks()
            assert_same(alone, run, float64_tolerance=TOLERANCE)
        except AssertionError as error:
            verdict = str(error)
        print(json.dumps({"run": f"{devices} {strategy}", "verdict": verdict, "held": held, "whole": whole}))


if __name__ == "__main__":
    main(sys.argv[1])
