"""Whether padding a batch changes what is trained: tried on one batch, not believed."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainingcompiler.frameworks.pytorch.interop.passthrough import passthrough
from trainingcompiler.frameworks.pytorch.interop.pytree import flatten

if TYPE_CHECKING:
    from trainingcompiler.frameworks.huggingface.buckets import Buckets

# Relative to the largest value. Sums of another length round differently, by about 1e-6 in float32 and 1e-2 in 16 bits;
# a mean over tokens that forgets the mask changes values by a third or more in this trial.
_TOLERANCE, _TOLERANCE_16_BITS = 1e-4, 5e-2


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What has been found.

    Attributes:
        reason: Why batches are not to be padded; None where the loss and all results stay the same.
        restores: Whether each result has its old shape back when its second dim is cut.
    """

    reason: str | None = None
    restores: bool = False


def try_padding(trainer: Any, batch: Mapping[str, Any], buckets: "Buckets") -> Trial:
    """Computes the loss of a batch with and without padding.

    Args:
        trainer: A `transformers.Trainer`.
        batch: A collated batch, shorter than the longest bucket.
        buckets: The lengths it would be padded to; here it is padded as far as they go, at most to twice its length.
    """
    from transformers import Trainer

    methods = ("compute_loss", "training_step")
    own = any(getattr(getattr(trainer, name), "__func__", None) is not getattr(Trainer, name) for name in methods)
    if own or trainer.compute_loss_func is not None:
        return Trial(reason="the loss is computed by code of your own, which padding may change")
    if any(isinstance(module, _BatchNorm) for module in trainer.model.modules()):
        return Trial(reason="the model has batch normalization, whose statistics padding would change")
    length = batch["input_ids"].shape[1]
    padded_length = min(2 * length, buckets.lengths[-1])
    far = type(buckets)(lengths=(padded_length,), pad_id=buckets.pad_id, labels_differ=buckets.labels_differ)
    with passthrough(), _evaluating(trainer.model), torch.no_grad():
        try:
            plain = _results(trainer, batch)
            padded = _results(trainer, far.pad(batch))
        except Exception:  # the Trainer will meet the same error, and tell it
            return Trial(reason="a trial with one batch failed")
    limit = _TOLERANCE_16_BITS if _is_16_bits(trainer) else _TOLERANCE
    mask = batch.get("attention_mask")
    differences = [_difference(one, other, mask) for one, other in zip(plain, padded, strict=True)]
    worst = max((difference for difference in differences if difference is not None), default=0.0)
    if not worst <= limit:
        return Trial(reason=f"padding changes what the model computes (by {worst:.1g} in a trial)")
    return Trial(restores=None not in differences)


def _results(trainer: Any, batch: Mapping[str, Any]) -> list[torch.Tensor]:
    """The loss, and every floating tensor that the model returns for the examples or for their tokens."""
    loss, outputs = trainer.compute_loss(trainer.model, trainer._prepare_inputs(dict(batch)), return_outputs=True)
    leaves, _ = flatten(tuple(outputs.values()) if isinstance(outputs, Mapping) else tuple(outputs))
    return [loss, *(leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point())]


def _difference(one: torch.Tensor, other: torch.Tensor, mask: torch.Tensor | None) -> float | None:
    if one.ndim > 1 and one.shape[1] < other.shape[1]:
        other = other[:, : one.shape[1]]
    if one.shape != other.shape:
        return None  # something of the inside, which the loss speaks for
    if mask is not None and one.shape[:2] == mask.shape:  # what stands at padding is nobody's business
        one, other = one[mask.bool()], other[mask.bool()]
    scale = max(one.abs().max().item(), 1e-6)
    return (one.double() - other.double()).abs().max().item() / scale


def _is_16_bits(trainer: Any) -> bool:
    short = {torch.bfloat16, torch.float16}
    return trainer.args.bf16 or trainer.args.fp16 or any(p.dtype in short for p in trainer.model.parameters())


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout; every module is put back as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
