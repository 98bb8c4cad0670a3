"""Which checkpointed block the script's Python is in: what `torch.utils.checkpoint` computes again in backward."""

from typing import Any

import torch

from trainingcompiler.errors import CaptureError
from trainingcompiler.frameworks.pytorch.recorder import user_line

_CHECKPOINT = "_checkpoint_hook.__init__.<locals>.pack_hook"


def region_of(tape: Any) -> int:
    """The number of the checkpointed block, counted on the tape; 0 outside of any.

    Raises:
        CaptureError: Somebody else's hooks want to see what autograd saves.
    """
    if tape.region:
        return tape.region
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None:
        return 0
    pack = hooks[0]
    if getattr(pack, "__qualname__", "") != _CHECKPOINT:
        raise CaptureError("saved_tensors_hooks look at what autograd saves", user_line())
    if tape.block is not pack:
        tape.block = pack
        tape.region_count += 1
    return tape.region_count
