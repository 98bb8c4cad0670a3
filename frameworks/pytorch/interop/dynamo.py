"""What `torch.compile` was given, and how it is left out."""

import contextlib
import sys
from contextlib import AbstractContextManager

import torch
from torch import nn

from trainingcompiler.frameworks.pytorch.interop.module_tensors import module_hooks


def as_written(module: nn.Module) -> nn.Module:
    """The module that `torch.compile(module)` was given, for one that it has returned; or the module itself."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is None or not isinstance(module, dynamo.OptimizedModule):
        return module
    return module if module_hooks(module) else as_written(module._orig_mod)


def left_out() -> AbstractContextManager:
    """Inside, whatever was given to `torch.compile` runs as it was written."""
    if "torch._dynamo" not in sys.modules:  # 2 s to import, and nothing has been compiled without it
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")
