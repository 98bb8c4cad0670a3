"""Which calls without gradients are compiled: a text that grows by a word a call has another shape each time.

The first shape of a module is. At any other, torch runs the calls until they have taken as long as compiling would:
whatever comes, that is at most twice the time of who knew it beforehand (the ski rental problem, Karlin et al. 1988,
https://doi.org/10.1007/BF01762111). 60 words by a small GPT took 17 s of compiling in place of 0.05 s.
"""

import weakref
from typing import Any

import torch
from torch import nn

from trainingcompiler.frameworks.pytorch.interop.source_lines import user_line
from trainingcompiler.reporting.events import Note, emit


class _Known:
    """What is known of one module's evaluations."""

    def __init__(self):
        self.compiled: set[tuple] = set()
        self.waiting_s: dict[tuple, float] = {}
        self.compile_time_s = 0.0
        self.is_random = False
        self.is_told = False


class EvalCompilePolicy:
    """The evaluations of every module."""

    def __init__(self):
        self._known: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()

    def waits(self, module: nn.Module, key: tuple) -> bool:
        """Whether torch runs the call, since its shapes are new and may not come again.

        One that has been seen to draw random numbers does not wait: by how long things take, the script's generator
        would be elsewhere.
        """
        known = self._known.get(module)
        if known is None or known.is_random or key in known.compiled:
            return False
        waited_s = known.waiting_s.setdefault(key, 0.0)
        if waited_s >= known.compile_time_s:
            return False
        if not known.is_told:
            known.is_told = True
            text = f"{type(module).__name__} is evaluated in PyTorch at shapes other than the first at {user_line()}"
            emit(Note(text=f"{text}, each until that has taken as long as compiling it ({known.compile_time_s:.1f} s)"))
        return True

    def waited(self, module: nn.Module, key: tuple, seconds: float, is_random: bool) -> None:
        """Notes how long torch took."""
        known = self._known[module]
        known.waiting_s[key] += seconds
        known.is_random |= is_random

    def compiled(self, module: nn.Module, key: tuple, seconds: float, is_random: bool) -> None:
        """Notes a call that was compiled, and how long that took."""
        known = self._known.setdefault(module, _Known())
        known.compiled.add(key)
        known.waiting_s.pop(key, None)
        known.compile_time_s = seconds
        known.is_random |= is_random


def key_of(module: nn.Module, leaves: list[Any], structure: Any) -> tuple:
    """What a program of an evaluation is for, as far as its caller decides: shapes, dtypes and constants."""
    return module.training, structure, tuple(map(_kind, leaves))


def _kind(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.dtype
    return leaf if isinstance(leaf, int | str | None) else type(leaf)
