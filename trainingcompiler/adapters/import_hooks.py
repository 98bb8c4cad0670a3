"""Calling back when a package has been imported, so that enabling works before and after `import torch`."""

import functools
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Callback = Callable[[], None]

_waiting: dict[str, list[Callback]] = {}


def after_import(module_name: str, callback: Callback) -> Callback:
    """Calls `callback` once, right after the module is first executed; at once if it has been already.

    Looking for the module without importing it (`importlib.util.find_spec`) does not trigger the call.

    Args:
        module_name: The absolute name of a module, as "torch".
        callback: Called in the importing thread; what it raises reaches the `import` statement.

    Returns:
        A function that withdraws the request; without effect once the callback has been called.
    """
    if sys.modules.get(module_name) is not None:
        callback()
        return lambda: None
    _waiting.setdefault(module_name, []).append(callback)
    if _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)
    return functools.partial(_withdraw, module_name, callback)


class _Finder:
    """Finds awaited modules as the other finders do, and listens on their loaders."""

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _waiting:
            return None
        for finder in sys.meta_path:
            spec = None if finder is cls else finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    # On the instance: the loader keeps its class, its methods and its pickled form, and a spec that
                    # is found and never executed does no harm.
                    vars(spec.loader)["exec_module"] = functools.partial(_execute, spec.loader)
                return spec
        return None


def _execute(loader: Any, module: ModuleType) -> None:
    vars(loader).pop("exec_module", None)
    loader.exec_module(module)
    for callback in _waiting.pop(module.__name__, ()):
        callback()
    _remove_idle_finder()


def _withdraw(module_name: str, callback: Callback) -> None:
    callbacks = _waiting.get(module_name, [])
    if callback in callbacks:
        callbacks.remove(callback)
    if not callbacks:
        _waiting.pop(module_name, None)
    _remove_idle_finder()


def _remove_idle_finder() -> None:
    if not _waiting and _Finder in sys.meta_path:
        sys.meta_path.remove(_Finder)
