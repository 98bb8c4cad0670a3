"""A recorded training step as a program for any batch size: the PyTorch half of `trainingcompiler.plan`."""

import contextlib
import dataclasses
from typing import Any

import torch

from trainingcompiler.errors import CaptureError, UsageError
from trainingcompiler.frameworks.pytorch.aot.eager_memory import peak_bytes
from trainingcompiler.frameworks.pytorch.aot.step_program import with_state
from trainingcompiler.frameworks.pytorch.capture.capture import CapturedStep, capture
from trainingcompiler.frameworks.pytorch.capture.traced_float import ConcretizationError
from trainingcompiler.frameworks.pytorch.interop.passthrough import passthrough
from trainingcompiler.frameworks.pytorch.runtime.program_cache import ProgramCache
from trainingcompiler.frameworks.pytorch.runtime.step_plan import Purpose, plan_step
from trainingcompiler.frameworks.pytorch.runtime.tensor_names import leaf_name
from trainingcompiler.frameworks.pytorch.tape.entries import Entry, Input
from trainingcompiler.program import StepProgram

_AUTOCAST = {"cpu": "autocast", "cuda": "cuda_autocast"}  # the field of `TorchModes` that says it, by device


class RecordedStep:
    """A tape that ends with an optimizer's step; see `planner.PlannableStep`."""

    def __init__(self, cache: ProgramCache, entries: list[Entry]):
        self._cache = cache
        self._entries = list(entries)

    def given(self) -> list[tuple[str, tuple[int, ...]]]:
        """The name and shape of every tensor that the calls on the tape were given."""
        return [
            (leaf_name(entry, place), leaf.shape)
            for entry in self._entries
            for place, leaf in enumerate(entry.leaves)
            if isinstance(leaf, Input)
        ]

    def program_at(self, rows: int, batch_size: int) -> StepProgram:
        """Captures the tape again; the optimizer's state is made for that, and taken away."""
        entries = self._with_rows(rows, batch_size)
        optimizers = self._optimizers(entries)
        for optimizer in optimizers:  # gradients die with the step, as in a loop that clears them
            habits = self._cache.registry.habits(optimizer)
            habits.clears |= not habits.zeroes
        with passthrough(), contextlib.ExitStack() as stack:
            for optimizer in optimizers:
                stack.enter_context(with_state(optimizer))
            captured = self._captured(entries, rows, batch_size)
            exports = [slot for entry in entries for slot in entry.outputs if slot.live]
            name = f"train_step_batch_{batch_size}"
            program = plan_step(self._cache, name, entries, captured, exports, Purpose.COMMIT).program
        if program is None or all(spec.role == "gradient" for spec in program.state):
            raise UsageError("the step changes nothing: does the optimizer train parameters that the loss depends on?")
        return program.with_batch(batch_size)

    def eager_bytes(self, rows: int, batch_size: int) -> int | None:
        """Counts what the tape allocates in torch; None where it cannot be replayed."""
        entries = self._with_rows(rows, batch_size)
        with passthrough(), contextlib.ExitStack() as stack:
            for optimizer in self._optimizers(entries):
                stack.enter_context(with_state(optimizer))
            try:
                return peak_bytes(entries)
            except Exception:  # what the script's own code raises for another batch is said by `program_at`
                return None

    def variants(self) -> dict[str, "RecordedStep"]:
        """In bfloat16, and with the blocks of a Transformers model computed again, where it does neither yet."""
        found: dict[str, RecordedStep] = {}
        device = self._entries[0].device.type
        if not any(getattr(entry.modes, _AUTOCAST[device]) for entry in self._entries):
            found[f'torch.autocast("{device}", dtype=torch.bfloat16) around the forward'] = self._in_bfloat16(device)
        models = [module for entry in self._entries for module in entry.modules]
        models = [module for module in models if getattr(module, "supports_gradient_checkpointing", False)]
        if models and not any(getattr(model, "is_gradient_checkpointing", True) for model in models):
            found["model.gradient_checkpointing_enable(), which computes blocks again"] = _Checkpointed(self, models)
        return found

    def _in_bfloat16(self, device: str) -> "RecordedStep":
        field = _AUTOCAST[device]
        modes: dict[str, Any] = {field: True, f"{field}_dtype": torch.bfloat16}
        entries = [
            entry if entry.optimizers else dataclasses.replace(entry, modes=entry.modes._replace(**modes))
            for entry in self._entries
        ]
        return RecordedStep(self._cache, entries)

    def recipe(self) -> dict[str, Any]:
        """The first group of the first optimizer; its learning rate is told with those of all groups."""
        optimizer = self._optimizers(self._entries)[0]
        group = optimizer.param_groups[0]
        found = {
            "optimizer": type(optimizer).__name__,
            "weight_decay": float(group.get("weight_decay", 0.0)),
        }
        if "betas" in group and len(group["betas"]) == 2:
            found["betas"], found["epsilon"] = tuple(map(float, group["betas"])), group.get("eps")
        return found

    @staticmethod
    def _optimizers(entries: list[Entry]) -> list[torch.optim.Optimizer]:
        return list({id(o): o for entry in entries for o in entry.optimizers}.values())

    def _captured(self, entries: list[Entry], rows: int, batch_size: int) -> CapturedStep:
        registry = self._cache.registry
        while True:
            try:
                return capture(entries, lambda optimizer: registry.habits(optimizer).constants)
            except ConcretizationError as error:  # a hyperparameter that has to be a constant, as a run finds out too
                source: Any = error.source
                of_optimizer = source is not None and source.optimizer is not None
                if not of_optimizer or not registry.fix_number(source.optimizer(), source.position):
                    raise CaptureError("the step decides by the value of a number", entries[0].where) from None
            except CaptureError:
                raise
            except Exception as error:
                reason = f"{type(error).__name__}: {error}".split("\n")[0]
                if batch_size == rows:
                    raise CaptureError(reason, entries[0].where) from error
                raise UsageError(
                    f"the step cannot be captured with a batch of {batch_size} in place of {rows}: something in the "
                    f"loop was computed from the batch size ({reason}). Name the script's option for it, "
                    "--batch-size-arg=--bs, and the script is run again for every size"
                ) from None

    def _with_rows(self, rows: int, batch_size: int) -> list[Entry]:
        scaled: dict[int, Input] = {}

        def of(leaf: Any) -> Any:
            if not isinstance(leaf, Input) or not leaf.shape or leaf.shape[0] != rows:
                return leaf
            if id(leaf) not in scaled:
                scaled[id(leaf)] = dataclasses.replace(
                    leaf, array=None, shape=(batch_size, *leaf.shape[1:]), strides=None
                )
            return scaled[id(leaf)]

        return [dataclasses.replace(entry, leaves=[of(leaf) for leaf in entry.leaves]) for entry in self._entries]


class _Checkpointed(RecordedStep):
    """A step whose Transformers models compute their blocks again on the way back."""

    def __init__(self, step: RecordedStep, models: list[Any]):
        super().__init__(step._cache, step._entries)
        self._models = models

    def program_at(self, rows: int, batch_size: int) -> StepProgram:
        """Captures the tape with the models switched, and switches them back."""
        for model in self._models:
            model.gradient_checkpointing_enable()
        try:
            return super().program_at(rows, batch_size)
        finally:
            for model in self._models:
                model.gradient_checkpointing_disable()


def pretend(entries: list[Entry]) -> None:
    """Leaves behind what a batch that is only accumulated leaves, but its values: gradients, and results of calls."""
    for entry in entries:
        for module in entry.modules:
            for parameter in module.parameters():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter)  # memory that nobody touches takes none
        for slot in entry.outputs:
            slot.value = torch.zeros(tuple(slot.meta.shape), dtype=slot.meta.dtype)
