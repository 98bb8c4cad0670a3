"""A Trainer that SIGTERM or SIGUSR1 tells to end: one checkpoint, at the same step on all workers, then it leaves."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
import transformers

from trainingcompiler.exit_codes import REQUEUE
from trainingcompiler.parallel import stop_signal
from trainingcompiler.parallel.stop_signal import StopSignal
from trainingcompiler.reporting.events import Note, Stopped, emit


@contextlib.contextmanager
def listening(trainer: Any) -> Iterator[None]:
    """Lets one `train()` end at a signal with a checkpoint and exit code 75.

    Transformers' own `enable_jit_checkpoint` is left to it.

    Args:
        trainer: A `transformers.Trainer` that is about to train.
    """
    if getattr(trainer.args, "enable_jit_checkpoint", False):
        yield
        return
    obstacle = stop_signal.obstacle()
    if obstacle:
        emit(Note(text=f"SIGTERM and SIGUSR1 end this Trainer at once, without a checkpoint: {obstacle}"))
        yield
        return
    with StopSignal() as signals:
        callback = _Stop(trainer, signals)
        trainer.add_callback(callback)  # the last one: what the others have decided on a step is known
        try:
            yield
        finally:
            trainer.remove_callback(callback)


class _Stop(transformers.TrainerCallback):
    """Asks after each step but the last one, after which the Trainer ends anyway.

    Args:
        trainer: Whose.
        signals: Asked by all workers.
    """

    def __init__(self, trainer: Any, signals: StopSignal):
        self._trainer = trainer
        self._signals = signals
        self._is_stopping = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Has the Trainer save and stop. An evaluation would only delay that: who has sent SIGTERM kills soon."""
        if state.global_step < state.max_steps and self._signals.requested():
            self._is_stopping = control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leaves, before the Trainer does what it does at the end of all steps.

        It would load the best model, and with `save_total_limit=1` remove the checkpoint that has just been written.
        """
        if not self._is_stopping:
            return
        self._is_stopping = False
        self._trainer.callback_handler.on_train_end(args, state, control)  # writers and bars are closed
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()  # all have written their parts
        if state.is_world_process_zero:
            emit(Stopped(text=self._said(args, state)))
        sys.exit(REQUEUE)

    def _said(self, args: Any, state: Any) -> str:
        path = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
        though = ', written although save_strategy="no"' if args.save_strategy == "no" else ""
        without = ", without the optimizer's state (save_only_model=True)" if args.save_only_model else ""
        return (
            f"{self._signals.reason}: stopped after step {state.global_step} of {state.max_steps}, exit code "
            f"{REQUEUE}; the checkpoint is {path}{though}{without}. To go on: the same command, and "
            "trainer.train(resume_from_checkpoint=True)"
        )
