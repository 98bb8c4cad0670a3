"""Installs the adapter in Accelerate and in the Trainer: where they look into the middle of a step."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

from trainingcompiler.adapters.patches import Patches
from trainingcompiler.frameworks import pytorch
from trainingcompiler.frameworks.huggingface import apply_recommendation, flag_scope
from trainingcompiler.frameworks.huggingface.conflicts import check
from trainingcompiler.frameworks.huggingface.loop import compiled_loop
from trainingcompiler.frameworks.pytorch.interop.passthrough import passthrough
from trainingcompiler.planning import planner


class Hooks:
    """The libraries' own functions, and ours in their place while installed."""

    def __init__(self):
        self._patches = Patches()
        self._waiting: list[tuple[str, str, dict[str, Callable]]] = [
            ("accelerate.accelerator", "Accelerator", {"clip_grad_norm_": _clip}),
            (
                "transformers.trainer",
                "Trainer",
                {"train": _train, "evaluate": _run, "predict": _run, **_LOOKS, **_MAKES},
            ),
            ("transformers.generation.utils", "GenerationMixin", {"generate": _generate}),
        ]

    def install(self) -> None:
        """Hooks what has been imported since the last call."""
        for item in tuple(self._waiting):
            module, kind, methods = item
            owner = vars(sys.modules[module]).get(kind) if module in sys.modules else None
            if owner is not None:
                self._waiting.remove(item)
                for name, inside in methods.items():
                    if name in vars(owner):  # not every version looks everywhere
                        self._replace(owner, name, inside)

    def uninstall(self) -> None:
        """Leaves the libraries as they were."""
        self._patches.restore()

    def _replace(self, owner: Any, name: str, inside: Callable) -> None:
        """Puts `inside(original, owner's instance, ...)` in the place of a method."""
        original = owner.__dict__[name]

        @functools.wraps(original)
        def method(instance: Any, *args: Any, **kwargs: Any) -> Any:
            return inside(original, instance, *args, **kwargs)

        self._patches.replace(owner, name, method, inside.__doc__.strip().split("\n")[0].rstrip("."))


def _clip(original: Callable, accelerator: Any, parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
    """Accelerate looks at every gradient first, for sharded ones; a compiled step has none."""
    session = pytorch.current_session()
    if session is None or not session.has_backward:
        return original(accelerator, parameters, max_norm, norm_type=norm_type)
    accelerator.unscale_gradients()
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type=norm_type)


def _has_mixed_mesh_grads(original: Callable, trainer: Any, model: Any) -> bool:
    """The Trainer looks at every gradient once, in the first step, for sharded ones."""
    session = pytorch.current_session()
    return original(trainer, model) if session is None or not session.has_backward else False


_LOOKS = {"_has_mixed_mesh_grads": _has_mixed_mesh_grads}


def _run(original: Callable, trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """A loop of the Trainer: what it looks at within a step is answered by the program."""
    if not flag_scope.compiles(trainer.args):
        with passthrough():
            return original(trainer, *args, **kwargs)
    check(trainer.args)
    with compiled_loop(trainer):
        return original(trainer, *args, **kwargs)


def _train(original: Callable, trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """A training of the Trainer, which may be planned, or told to stop."""
    if planner.current is not None and flag_scope.compiles(trainer.args):
        apply_recommendation.tell(planner.current, trainer)
    if not flag_scope.compiles(trainer.args):
        return _run(original, trainer, *args, **kwargs)
    from trainingcompiler.frameworks.huggingface.stopping import listening  # it imports transformers

    with listening(trainer):
        return _run(original, trainer, *args, **kwargs)


_MAKES = {"__init__": apply_recommendation.init}


def _generate(original: Callable, model: Any, *args: Any, **kwargs: Any) -> Any:
    """Generating is no training: it calls the model with another shape for every token."""
    session = pytorch.current_session()
    if session is not None:
        session.state_is_read()
    with passthrough():
        return original(model, *args, **kwargs)
