"""State that several workers divide: which tensors it is, and who holds which part.

`DistributedDataParallel` keeps a model's parameters, and so their optimizer's state, the same on all workers. Under
`--strategy fsdp` each holds a part of them only (FSDP, Zhao et al. 2023, https://arxiv.org/abs/2304.11277), from the
first step on. Whoever looks at one gathers it (`lockstep`).
"""

import weakref
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import jax
import torch
from jax.sharding import Sharding
from torch import nn

from trainingcompiler.errors import TrainingCompilerError
from trainingcompiler.frameworks.pytorch.interop.arrays import numpy_view, tensor_of
from trainingcompiler.frameworks.pytorch.state.offloaded import OffloadedTensor, away, bring_back, offloaded_of
from trainingcompiler.parallel import spmd
from trainingcompiler.parallel.arrays import placed_array
from trainingcompiler.parallel.lockstep import Lockstep
from trainingcompiler.reporting.events import Note, emit


class ShardedState:
    """The arrays that workers hold parts of. All number them alike, as all run the same programs in the same order.

    Attributes:
        roll_call: By which workers come together.
        version: Grows when a tensor turns out not to be the same on all workers.
    """

    def __init__(self) -> None:
        self.lockstep = Lockstep(self._hand_over)
        self._common: dict[int, weakref.ref[nn.Parameter]] = {}  # by identity
        self._sharded: dict[int, ShardedTensor] = {}
        self._late: dict[int, ShardedTensor] = {}  # of tensors that are gone here, and perhaps not elsewhere
        self._count = 0
        self.version = 0
        self._own: set[int] = set()  # parameters that workers have changed alone, by identity

    def share(self, parameters: Iterable[nn.Parameter]) -> None:
        """Takes note of parameters that are the same on all workers."""
        for parameter in parameters:
            if id(parameter) not in self._own:
                self._common[id(parameter)] = weakref.ref(parameter)

    def forget(self, parameters: Sequence[torch.Tensor], where: str | None) -> None:
        """Leaves to each worker what it changes by gradients that the program has not averaged: copies may differ."""
        lost = [id(parameter) for parameter in parameters if self._common.pop(id(parameter), None) is not None]
        if not lost:
            return
        self._own.update(lost)
        self.version += 1
        at = f" at {where}" if where else ""
        text = (
            f"{len(lost)} parameters{at} are updated by gradients that this program does not average over the workers, "
            "so each keeps them whole from now on, as without --strategy fsdp"
        )
        emit(Note(text=text))

    def common(self, optimizers: Iterable[torch.optim.Optimizer]) -> Collection[int]:
        """The tensors that are the same on all workers, by identity: such parameters, and what belongs to them."""
        found = {key for key, parameter in self._common.items() if parameter() is not None}
        for optimizer in optimizers:
            for parameter, state in optimizer.state.items():
                if id(parameter) in found:
                    found |= {id(value) for value in state.values()}
        return found

    def meet(self, program: str) -> None:
        """Waits until all workers have come to the same program.

        Raises:
            TrainingCompilerError: They have come to something else.
        """
        self.lockstep.run(program)
        self._late.clear()

    def fetch(self, sharded: Sequence["ShardedTensor"], what: str) -> None:
        """Makes divided tensors whole."""
        if sharded:
            self.lockstep.fetch([sharded.number for sharded in sharded], what)

    def end(self) -> None:
        """Gives torch everything back: all workers go on without compiled steps."""
        self.bring_back(away(), "tc.disable()")

    def bring_back(self, tensors: Iterable[torch.Tensor], what: str) -> None:
        """Gives torch the values of tensors, those that are divided all at once."""
        tensors = list(tensors)
        sharded = (offloaded_of(tensor) for tensor in tensors)
        self.fetch([sharded for sharded in sharded if isinstance(sharded, ShardedTensor) and sharded.is_divided], what)
        bring_back(tensors)

    def sharded(self, tensor: torch.Tensor) -> "ShardedTensor":
        """A tensor that may come to be divided."""
        return ShardedTensor(tensor, self)

    def enter(self, sharded: "ShardedTensor", tensor: torch.Tensor) -> None:
        """Gives a tensor the number that it has on all workers."""
        self._count += 1
        sharded.number = self._count
        self._sharded[sharded.number] = sharded
        weakref.finalize(tensor, self._bury, sharded).atexit = False

    def _bury(self, sharded: "ShardedTensor") -> None:
        self._late[sharded.number] = self._sharded.pop(sharded.number)

    def _hand_over(self, wanted: Sequence[int], own: Sequence[int]) -> None:
        for number in wanted:
            sharded = self._sharded.get(number) or self._late.get(number)
            part = None if sharded is None else sharded.part()
            if sharded is None or part is None:
                raise TrainingCompilerError(
                    "another worker looks at a tensor that this one does not have any more: look at it before, or keep "
                    "the model on all ranks"
                )
            whole = spmd.gathered(part)
            if number in own:
                sharded.take(whole)


class ShardedTensor(OffloadedTensor):
    """A tensor whose values are with the steps, and, if all workers have the same, divided between them.

    Attributes:
        number: What all workers call it, once it is divided; else 0.
    """

    __slots__ = ("_sharded_state", "_sharding", "number")

    def __init__(self, tensor: torch.Tensor, sharded_state: ShardedState):
        super().__init__(tensor)
        self._sharded_state = sharded_state
        self._sharding: Sharding | None = None  # how it is divided
        self.number = 0

    @property
    def is_divided(self) -> bool:
        """Whether this worker has a part only."""
        return self._array is not None and not self._array.sharding.is_fully_replicated

    def array(self, sharding: Any, written: bool = False) -> jax.Array:
        """The array to pass to a step, placed as the step wants it: gathered, if it is divided and is to be whole."""
        if sharding.is_fully_replicated:
            if self.is_divided:
                self._sharded_state.fetch([self], "a value")
        else:
            self._sharding = sharding
            if not self.number:
                tensor = self.tensor()
                assert tensor is not None
                self._sharded_state.enter(self, tensor)
        return super().array(sharding, written)

    def update(self, array: jax.Array) -> None:
        """Takes over what a step has made of the array."""
        if self._array is not None or array.sharding.is_fully_replicated:
            super().update(array)
            return
        self._array = array  # for a moment: the tensor keeps its values, as others share its memory
        self._sharded_state.fetch([self], "the memory of a tensor that others share")
        whole, self._array = self._array, None
        tensor = self.tensor()
        assert tensor is not None
        tensor.detach().copy_(tensor_of(whole))

    def fetch(self) -> None:
        """Gives the tensor its values back; without effect while it has them."""
        if self.is_divided:
            self._sharded_state.fetch([self], "a value")
        super().fetch()

    def take(self, whole: jax.Array) -> None:
        """Holds the whole of what it has held a part of."""
        self._array = whole

    def part(self) -> jax.Array | None:
        """This worker's part; None if the values were with a tensor that is gone."""
        assert self._sharding is not None
        if self._array is not None:
            return placed_array(self._array, self._sharding)
        tensor = self.tensor()
        return None if tensor is None else placed_array(numpy_view(tensor), self._sharding)
