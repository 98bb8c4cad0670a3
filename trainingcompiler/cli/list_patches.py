"""`launch --list-patches`: what is replaced in the frameworks that are installed, for whoever looks for a clash."""

import importlib
import importlib.util

import trainingcompiler
from trainingcompiler.adapters import dispatch, patches
from trainingcompiler.config import TrainingCompilerConfig
from trainingcompiler.reporting import events


def list_patches() -> list[str]:
    """Enables each adapter whose framework is installed, and says what that has replaced; then all is taken back.

    What workers of a script replace in `torch.distributed`, and what a class of optimizers replaces when its first one
    is made, is not among it.
    """
    for module in dispatch.HOOKED:
        if importlib.util.find_spec(module.split(".")[0]) is not None:
            importlib.import_module(module)
    trainingcompiler.enable(TrainingCompilerConfig(quiet=True))
    events.forget_end()  # there is no run to sum up
    found = sorted(map(str, patches.in_force()))
    trainingcompiler.disable()
    return found
