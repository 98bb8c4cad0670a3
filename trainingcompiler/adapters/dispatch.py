"""Which adapter a function belongs to, told by what it uses, without importing a framework."""

import dis
import functools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from trainingcompiler.errors import UsageError

HOOKED = {
    "torch": "trainingcompiler.frameworks.pytorch",
    "accelerate": "trainingcompiler.frameworks.huggingface",
    "transformers.trainer": "trainingcompiler.frameworks.huggingface",
    "transformers.generation.utils": "trainingcompiler.frameworks.huggingface",
    "keras": "trainingcompiler.frameworks.keras",
}
"""What a script imports -> the adapter whose `enable(config)` and `disable()` hook it."""

ALWAYS_HOOKED = ("keras",)
"""Adapters that take the script's own `training_compiler=` even where nothing is compiled."""

_STEPS = {"torch": "trainingcompiler.frameworks.pytorch", "tensorflow": "trainingcompiler.frameworks.tensorflow"}
_FRAMEWORK_OF = {"torch": "torch", "tensorflow": "tensorflow", "keras": "tensorflow"}
_DEPTH = 3  # functions that a step calls, and those that they call, are looked at as well


def for_step(train_step: Callable) -> str:
    """Returns the module of the adapter that compiles `train_step`.

    Raises:
        UsageError: Both frameworks are imported, and what the function uses does not tell which it trains with.
    """
    imported = [framework for framework in _STEPS if framework in sys.modules]
    if len(imported) < 2:
        return _STEPS[imported[0] if imported else "torch"]
    own = _framework_of(type(train_step))
    used = {own} if own else set(_frameworks_used_by(train_step, _DEPTH))
    if len(used) == 1:
        return _STEPS[used.pop()]
    name = getattr(train_step, "__name__", "the function")
    found = "uses both" if used else "names neither of them, nor a model or an optimizer of theirs"
    raise UsageError(
        f"tc.compile({name}): PyTorch and TensorFlow are both imported, and {name} {found}, so it cannot be told which "
        "one it trains with. Keep to one in the function and let it name its model; or, for TensorFlow, decorate it "
        "with @tf.function."
    )


def _frameworks_used_by(item: Any, depth: int) -> Iterator[str]:
    """The frameworks of the objects that a function names: globals, closed-over names, bound arguments."""
    while isinstance(item, functools.partial):
        for bound in (*item.args, *item.keywords.values()):
            yield from _frameworks_of(bound, depth)
        item = item.func
    if isinstance(item, types.MethodType):
        yield from _frameworks_of(item.__self__, depth)
        for value in vars(item.__self__).values() if hasattr(item.__self__, "__dict__") else ():
            yield from _frameworks_of(value, 0)
        item = item.__func__
    code = getattr(item, "__code__", None)
    if code is None:
        return
    for instruction in dis.get_instructions(code):  # `co_names` has the names of attributes as well
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME") and instruction.argval in item.__globals__:
            yield from _frameworks_of(item.__globals__[instruction.argval], depth)
    for cell in item.__closure__ or ():
        try:
            value = cell.cell_contents
        except ValueError:  # a name that is assigned later
            continue
        yield from _frameworks_of(value, depth)


def _frameworks_of(value: Any, depth: int) -> Iterator[str]:
    framework = _framework_of(value if isinstance(value, type) else type(value))
    if framework is None and isinstance(value, types.ModuleType):
        framework = _FRAMEWORK_OF.get(value.__name__.split(".")[0])
    if framework is None and isinstance(value, types.FunctionType):
        framework = _FRAMEWORK_OF.get((value.__module__ or "").split(".")[0])
    if framework is not None:
        yield framework
    elif depth and isinstance(value, types.FunctionType | types.MethodType | functools.partial):
        yield from _frameworks_used_by(value, depth - 1)


def _framework_of(kind: type) -> str | None:
    roots = (base.__module__.split(".")[0] for base in kind.__mro__)
    return next((_FRAMEWORK_OF[root] for root in roots if root in _FRAMEWORK_OF), None)
