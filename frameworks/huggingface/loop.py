"""The Trainer's loop, without its looks into the middle of a step."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from trainingcompiler.frameworks import pytorch
from trainingcompiler.frameworks.huggingface.buckets import Buckets, buckets_for
from trainingcompiler.frameworks.pytorch.tape.deferred_tensor import DeferredTensor
from trainingcompiler.reporting.events import Note, emit


@contextlib.contextmanager
def compiled_loop(trainer: Any) -> Iterator[None]:
    """Puts `_Loop` around the trainer's steps, whether they are the Trainer's own or a subclass's.

    Args:
        trainer: A `transformers.Trainer` that is about to train, evaluate or predict.
    """
    if isinstance(getattr(trainer.training_step, "__self__", None), _Loop):  # evaluation during training
        yield
        return
    if trainer.args.fp16 and trainer.args.device.type == "cpu":
        emit(Note(text="fp16=True has no effect on a CPU, where Accelerate trains in float32; bf16=True has"))
    if trainer.args.save_strategy != "no":
        _name_in_config(trainer.model)
    loop = _Loop(trainer)
    before = {name: vars(trainer).get(name) for name in ("training_step", "prediction_step")}
    trainer.training_step, trainer.prediction_step = loop.training_step, loop.prediction_step
    try:
        yield
    finally:
        for name, value in before.items():
            delattr(trainer, name) if value is None else setattr(trainer, name, value)


def _name_in_config(model: Any) -> None:
    """Writes into the configuration what `save_pretrained` will write into it, or the first save would recompile."""
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        model.config.dtype = str(model.dtype).removeprefix("torch.")
        model.config.architectures = [type(model).__name__]


class _Loop:
    """What one call of `train`, `evaluate` or `predict` does to the batches and losses that pass.

    Attributes:
        trainer: Whose loop it is.
        buckets: The lengths that batches are padded to; None where padding would change the loss.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.buckets: Buckets | None = buckets_for(trainer)
        self._training_step: Callable = trainer.training_step
        self._prediction_step: Callable = trainer.prediction_step

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The trainer's own step on a batch of a known length, with a loss that the Trainer need not look at."""
        loss = self._training_step(model, self._padded(inputs), *args, **kwargs)
        if self.trainer.args.logging_nan_inf_filter:
            loss = self._filtered(loss)
        return loss

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own step on a padded batch; predictions and labels come back without the padding."""
        padded = inputs
        if prediction_loss_only or (self.buckets and self.buckets.restores and self._predicts_as_trainer):
            padded = self._padded(inputs)
        loss, logits, labels = self._prediction_step(model, padded, prediction_loss_only, *args, **kwargs)
        if padded is not inputs and self.buckets is not None:
            logits, labels = (self.buckets.restored(part, inputs, padded) for part in (logits, labels))
        return loss, logits, labels

    @property
    def _predicts_as_trainer(self) -> bool:
        from transformers import Trainer

        return type(self.trainer).prediction_step is Trainer.prediction_step

    def _padded(self, inputs: Any) -> Any:
        session = pytorch.current_session()
        if self.buckets is None or session is None or not session.deferring:  # torch needs no equal lengths
            return inputs
        return self.buckets.pad(inputs)

    def _filtered(self, loss: torch.Tensor) -> torch.Tensor:
        """Does in the program what `logging_nan_inf_filter` does by looking at the loss between backward and step.

        The Trainer adds the mean of the losses since the last log in the place of one that is not finite.
        """
        session, trainer = pytorch.current_session(), self.trainer
        if session is None or not isinstance(loss, DeferredTensor) or loss.slot.committed:
            return loss
        steps = torch.tensor(1.0 + trainer.state.global_step - trainer._globalstep_last_logged)
        filtered = session.call(_finite_or_mean, (loss, trainer._tr_loss, steps), {})
        if isinstance(filtered, DeferredTensor):
            filtered.slot.finite = True
        return filtered


def _finite_or_mean(loss: torch.Tensor, total: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    return torch.where(torch.isfinite(loss), loss, total / steps)
