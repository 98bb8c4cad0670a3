"""Length buckets: batches of any length, few compiled programs, and the loss of the unpadded batch."""

import random
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F

from trainingcompiler.frameworks.huggingface.padding_trial import Trial, try_padding
from trainingcompiler.frameworks.huggingface.samples import Samples, sample
from trainingcompiler.reporting.events import Note, emit

_SHORTEST = 16
_IGNORED = -100  # the label that every loss of transformers leaves out
_known: weakref.WeakKeyDictionary[Any, "Buckets | None"] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """The lengths that batches are padded to, at their end.

    Attributes:
        lengths: In tokens, ascending. A batch longer than the last is left as it is.
        pad_id: What `input_ids` are padded with.
        labels_differ: Whether labels may have another length than `input_ids`, as those of a decoder.
        restores: Whether the padding can be taken off everything that the model returns.
    """

    lengths: tuple[int, ...]
    pad_id: int
    labels_differ: bool
    restores: bool = False

    def length_for(self, length: int) -> int:
        """The smallest bucket that holds `length` tokens."""
        return next((bucket for bucket in self.lengths if bucket >= length), length)

    def pad(self, inputs: Any) -> Any:
        """A batch with its sequences padded to the next bucket; other values are passed on.

        Args:
            inputs: A mapping with `input_ids` of shape `[batch, length]`; anything else is returned unchanged.
        """
        ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
        if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
            return inputs
        padded = dict(inputs)
        for name, fill in self._fills(inputs, ids.shape[1]).items():
            tensor = inputs[name]
            missing = self.length_for(tensor.shape[1]) - tensor.shape[1]
            if missing:
                padded[name] = F.pad(tensor, (0, missing), value=fill)
        return padded

    def restored(self, value: Any, inputs: Mapping[str, Any], padded: Mapping[str, Any]) -> Any:
        """A value computed from a padded batch, as the batch without padding gives it.

        Args:
            value: Tensors of shape `[batch, length, ...]` are cut; others, and other shapes, are passed on.
            inputs: The batch.
            padded: What `pad` has made of it.
        """
        if isinstance(value, list | tuple):
            return type(value)(self.restored(item, inputs, padded) for item in value)
        length, padded_length = inputs["input_ids"].shape[1], padded["input_ids"].shape[1]
        if isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[1] == padded_length:
            return value[:, :length]
        return value

    def unknown(self, inputs: Mapping[str, Any]) -> str | None:
        """The name of a tensor that has a value for each token, and that nobody knows how to pad."""
        length = inputs["input_ids"].shape[1]
        fills = self._fills(inputs, length)
        for name, tensor in inputs.items():
            if name not in fills and isinstance(tensor, torch.Tensor) and length in tensor.shape[1:]:
                return name
        return None

    def _fills(self, inputs: Mapping[str, Any], length: int) -> dict[str, int]:
        fills = {"input_ids": self.pad_id, "attention_mask": 0, "token_type_ids": 0}
        if self.labels_differ:
            fills |= {"decoder_input_ids": self.pad_id, "decoder_attention_mask": 0}
        labels = inputs.get("labels")
        is_index = isinstance(labels, torch.Tensor) and labels.dtype == torch.int64 and labels.ndim == 2
        if is_index and (self.labels_differ or labels.shape[1] == length):
            fills["labels"] = _IGNORED
        tensors = {name: inputs.get(name) for name in fills}
        return {n: fills[n] for n, t in tensors.items() if isinstance(t, torch.Tensor) and t.ndim == 2}


def buckets_for(trainer: Any) -> Buckets | None:
    """The buckets for a trainer's data; found, tried on a batch and announced once.

    Args:
        trainer: A `transformers.Trainer`.

    Returns:
        None where all batches have one length, or padding would change the loss.
    """
    if trainer not in _known:
        _known[trainer] = _find(trainer)
    return _known[trainer]


def geometric(longest: int, coarse: bool = False) -> tuple[int, ...]:
    """Lengths from 16 to `longest`, each a half or a third more than the one before.

    Args:
        longest: The last bucket, in tokens.
        coarse: Whether each is twice the one before.
    """
    lengths, base = [], _SHORTEST
    while base < longest:
        lengths += [base] if coarse else [base, base * 3 // 2]
        base *= 2
    return (*(length for length in lengths if length < longest), longest)


def _find(trainer: Any) -> Buckets | None:
    python_state = random.getstate()
    with torch.random.fork_rng(devices=[]):  # looking at the data must not change what is drawn in training
        try:
            samples = sample(trainer)
            return None if samples is None else _tried(trainer, samples)
        finally:
            random.setstate(python_state)


def _tried(trainer: Any, samples: Samples) -> Buckets | None:
    config = getattr(trainer.model, "config", None)
    decodes = bool(getattr(config, "is_encoder_decoder", False))
    pad_id = getattr(config, "pad_token_id", None)
    buckets = Buckets(
        lengths=geometric(samples.longest, coarse=decodes),
        pad_id=pad_id if isinstance(pad_id, int) and pad_id >= 0 else 0,
        labels_differ=decodes,
    )
    unknown = buckets.unknown(samples.batch)
    trial = Trial() if unknown else try_padding(trainer, samples.batch, buckets)
    reason = f"nobody knows how to pad {unknown}" if unknown else trial.reason
    if reason:
        emit(Note(text=f"batches have {samples.shortest} to {samples.longest} tokens, and {reason}: {_OWN_LENGTHS}"))
        return None
    before, after = waste(samples.lengths, trainer.args.train_batch_size, buckets)
    used = [length for length in buckets.lengths if length >= samples.shortest]
    emit(
        Note(
            text=f"batches are padded to {len(used)} lengths, {', '.join(map(str, used))}: "
            f"{after:.0%} of all tokens are padding, {before:.0%} without; losses are those of the unpadded batches"
        )
    )
    # As many classes as tokens would look like tokens.
    restores = trial.restores and not decodes and getattr(config, "num_labels", None) not in buckets.lengths
    return replace(buckets, restores=restores)


_OWN_LENGTHS = (
    "each length is compiled once, and lengths beyond the 32nd run eagerly. For fewer, pad in the collator "
    "(pad_to_multiple_of=64)"
)


def waste(lengths: Sequence[int], batch_size: int, buckets: Buckets) -> tuple[float, float]:
    """The share of padding among all tokens, without buckets and with them, if batches are drawn by chance.

    Args:
        lengths: Of examples, in tokens.
        batch_size: Examples in a batch.
        buckets: What batches are padded to.
    """
    order = list(lengths)
    random.Random(0).shuffle(order)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    used = sum(order)
    dynamic = sum(len(batch) * max(batch) for batch in batches)
    bucketed = sum(len(batch) * buckets.length_for(max(batch)) for batch in batches)
    return 1 - used / dynamic, 1 - used / bucketed
