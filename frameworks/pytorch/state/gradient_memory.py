"""The memory of gradients, used again at every step.

torch's gradients can be read after `optimizer.step()`, until the script clears them, and so can ours. A program that
returned them would have new memory at every step, which the system has to fill with zeros first (6% of a step of an MLP
with AdamW). So the program writes them where it wrote the last ones, unless somebody still holds those.
"""

import sys
import weakref
from typing import Any

import torch

from trainingcompiler.frameworks.pytorch.interop.arrays import numpy_view
from trainingcompiler.frameworks.pytorch.state.ownership import is_referred_to
from trainingcompiler.frameworks.pytorch.state.shared_tensors import StateRegistry
from trainingcompiler.parallel.arrays import owned_array


class GradientMemory:
    """A tensor for the gradient of each parameter.

    Args:
        registry: Of the tensors that torch and XLA share.
    """

    def __init__(self, registry: StateRegistry):
        self._registry = registry
        # By a parameter's identity: a reference to it, the tensor, and where that lies.
        self._tensors: dict[int, list[Any]] = {}

    def tensor_for(self, parameter: torch.Tensor) -> torch.Tensor:
        """A tensor like a parameter that nobody else holds; what is in it is nobody's business."""
        known = self._tensors.get(id(parameter))
        if known is None or known[0]() is not parameter or not _fits(known, parameter):
            with torch._C.DisableTorchFunction():
                array = owned_array(numpy_view(torch.empty(parameter.shape, dtype=parameter.dtype)))
            tensor = self._registry.tensor_for(array, parameter.dtype, parameter.device)
            known = [weakref.ref(parameter, self._forget(id(parameter))), tensor, tensor.data_ptr()]
            self._tensors[id(parameter)] = known
        return known[1]

    def _forget(self, key: int) -> Any:
        tensors = weakref.ref(self)

        def forget(reference: weakref.ref) -> None:
            memory = tensors()
            if memory is not None and key in memory._tensors and memory._tensors[key][0] is reference:
                del memory._tensors[key]

        return forget


def _fits(known: list[Any], parameter: torch.Tensor) -> bool:
    if known[1].shape != parameter.shape or known[1].dtype is not parameter.dtype:
        return False
    # Who else may hold it: Python (the list does, and the argument of the count), torch, if it is some parameter's
    # `.grad` or was exported, and views. The memory is XLA's, so that NumPy comes to it by one of these only.
    if sys.getrefcount(known[1]) > 2 or known[1]._use_count() > 1 or known[1].data_ptr() != known[2]:
        return False
    return not is_referred_to(known[1].untyped_storage())
