"""Which dim of each of a model's tensors is divided between devices that share a layer; see `tensor_parallel`."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from trainingcompiler.frameworks.pytorch.capture.capture import LiftedTensor
from trainingcompiler.parallel.layer_rules import Rules, Side, side_of


class TensorParallelDims:
    """What is known of the layers of the models that train: an optimizer's program does not know their names."""

    def __init__(self):
        self._dims: Any = WeakIdKeyDictionary()  # parameter -> dim

    def see(self, modules: Iterable[nn.Module]) -> None:
        """Learns the layers of models."""
        for module in modules:
            own = _plan_of(module)
            for name, layer in module.named_modules():
                side = side_of(name, own)
                for kind, parameter in layer._parameters.items() if side else ():
                    dim = _dim(layer, kind, side)
                    if parameter is not None and dim is not None:
                        self._dims.setdefault(parameter, dim)

    def dims(self, optimizers: Iterable[torch.optim.Optimizer], lifted: Iterable[LiftedTensor]) -> dict[int, int]:
        """The divided dims of parameters and of what belongs to them.

        Args:
            optimizers: Whose state follows the parameters that it is of.
            lifted: What a program reads: gradients follow their parameters too.

        Returns:
            Identity of a tensor -> dim; those that each device has whole are left out.
        """
        dims = {id(parameter): dim for parameter, dim in self._dims.items()}
        for optimizer in optimizers:
            for parameter, state in optimizer.state.items():
                for value in state.values():
                    if id(parameter) in dims and isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                        dims[id(value)] = dims[id(parameter)]
        for item in lifted:
            if item.gradient_of is not None and (dim := dims.get(id(item.gradient_of()))) is not None:
                dims[id(item.tensor())] = dim
        return dims


def _dim(layer: nn.Module, kind: str, side: Side) -> int | None:
    if kind == "bias":
        return 0 if side == "column" else None
    if kind != "weight":
        return None
    # transformers' Conv1D keeps its weight as (inputs, outputs); an embedding's rows are its vocabulary.
    inputs_first = isinstance(layer, nn.Embedding) or type(layer).__name__ == "Conv1D"
    return int(inputs_first == (side == "column"))


def _plan_of(module: Any) -> Rules:
    """What a model of transformers says itself: `config.base_model_tp_plan`."""
    plan = getattr(getattr(module, "config", None), "base_model_tp_plan", None) or {}
    sides: dict[str, Side] = {"colwise": "column", "rowwise": "row"}
    return {f"*{pattern}": sides[words] for pattern, words in plan.items() if words in sides}
