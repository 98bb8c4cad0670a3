"""How a program finds its tensors again at every step."""

import weakref
from collections.abc import Iterable

import torch

from trainingcompiler.frameworks.pytorch.capture.capture import LiftedTensor
from trainingcompiler.frameworks.pytorch.interop.gradients import stored_gradient


class Bindings:
    """The tensors that a program was captured with, or those that have taken their places.

    Parameters, buffers and constants are bound by identity. Gradients are found through their parameters, and optimizer
    state through the optimizer, because `load_state_dict` puts new tensors there.
    """

    def __init__(self, lifted: list[LiftedTensor], optimizers: Iterable[torch.optim.Optimizer]):
        self._count = len(lifted)
        self._identities: list[tuple[int, weakref.ref]] = []
        self._gradients: list[tuple[int, weakref.ref]] = []
        self._states: list[tuple[weakref.ref, weakref.ref, list[tuple[int, str]]]] = []
        self._geometries: list[tuple[int, torch.Size, torch.dtype]] = []  # of those that can be replaced
        positions = {id(item.tensor()): index for index, item in enumerate(lifted)}
        for optimizer in optimizers:
            for parameter, state in optimizer.state.items():
                places = [(positions.pop(id(value), -1), name) for name, value in state.items()]
                places = [(index, name) for index, name in places if index >= 0]
                if places:
                    self._states.append((weakref.ref(optimizer), weakref.ref(parameter), places))
        for index, item in enumerate(lifted):
            tensor = item.tensor()
            if id(tensor) in positions and item.gradient_of is None:
                self._identities.append((index, item.tensor))
                continue
            self._geometries.append((index, tensor.shape, tensor.dtype))
            if item.gradient_of is not None:
                self._gradients.append((index, item.gradient_of))

    def tensors(self) -> list[torch.Tensor] | None:
        """The tensors in the order of `lifted`; None if one is gone or has another shape or dtype."""
        found: list[torch.Tensor | None] = [None] * self._count
        for index, reference in self._identities:
            found[index] = reference()
        for index, reference in self._gradients:
            parameter = reference()
            found[index] = None if parameter is None else stored_gradient(parameter)
        for of_optimizer, of_parameter, places in self._states:
            optimizer, parameter = of_optimizer(), of_parameter()
            state = None if optimizer is None or parameter is None else optimizer.state.get(parameter)
            for index, name in places if state else ():
                found[index] = state.get(name)
        tensors = [tensor for tensor in found if tensor is not None]
        if len(tensors) < self._count:
            return None
        for index, shape, dtype in self._geometries:
            if tensors[index].shape != shape or tensors[index].dtype is not dtype:
                return None
        return tensors
