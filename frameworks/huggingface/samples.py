"""A look at the training data before training: how long examples are, and a batch of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

_LOOKED_AT = 512  # examples; a tokenized one costs about 50 us


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What some examples of the training data say about all of them.

    Attributes:
        lengths: Of the examples, in tokens.
        shortest: The length of a batch of short examples, as the collator makes it.
        longest: The same of long ones.
        batch: A collated batch, shorter than the longest, as the model gets it.
    """

    lengths: list[int]
    shortest: int
    longest: int
    batch: Mapping[str, Any]


def sample(trainer: Any) -> Samples | None:
    """Looks at the trainer's data.

    Args:
        trainer: A `transformers.Trainer`.

    Returns:
        None where the data are no text of different lengths, or cannot be looked at without being used up.
    """
    data = trainer.train_dataset if trainer.train_dataset is not None else trainer.eval_dataset
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__") or isinstance(data, dict) or not len(data):
        return None
    first = data[0]
    if not isinstance(first, Mapping) or "input_ids" not in first:
        return None
    stride = max(1, len(data) // _LOOKED_AT)
    examples = sorted((data[index] for index in range(0, len(data), stride)), key=lambda one: len(one["input_ids"]))
    lengths = [len(example["input_ids"]) for example in examples]
    if lengths[0] == lengths[-1]:
        return None
    size = min(max(1, trainer.args.train_batch_size), len(examples))
    middle = (len(examples) - size) // 2
    try:
        short, medium, long = (
            _collated(trainer, examples[start : start + size]) for start in (0, middle, len(examples) - size)
        )
        shortest, longest = (batch["input_ids"].shape[1] for batch in (short, long))
    except Exception:  # a collator that fails, or makes something else, is told by the Trainer itself
        return None
    if shortest >= longest:
        return None
    batch = medium if medium["input_ids"].shape[1] < longest else short
    return Samples(lengths=lengths, shortest=shortest, longest=longest, batch=batch)


def _collated(trainer: Any, examples: list[Mapping[str, Any]]) -> Mapping[str, Any]:
    if trainer.args.remove_unused_columns:
        trainer._set_signature_columns_if_needed()
        kept = set(trainer._signature_columns)
        examples = [{name: value for name, value in one.items() if name in kept} for one in examples]
    batch = trainer.data_collator(examples)
    if not isinstance(batch["input_ids"], torch.Tensor) or batch["input_ids"].ndim != 2:
        raise TypeError("input_ids are no matrix")
    return batch
