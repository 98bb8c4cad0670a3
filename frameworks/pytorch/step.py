"""`tc.compile`: one function that does forward, backward and `optimizer.step()`, as one program."""

import functools
import time
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook

from trainingcompiler import planner
from trainingcompiler.config import TrainingCompilerConfig
from trainingcompiler.errors import CaptureError, UsageError
from trainingcompiler.frameworks.pytorch import devices, tensor_hooks
from trainingcompiler.frameworks.pytorch.compiled_tape import Purpose
from trainingcompiler.frameworks.pytorch.engine import EngineChoice, engine_of
from trainingcompiler.frameworks.pytorch.fallback import ANOMALY, Fallbacks
from trainingcompiler.frameworks.pytorch.loops import OptimizerBook
from trainingcompiler.frameworks.pytorch.modules import ModuleWatch
from trainingcompiler.frameworks.pytorch.numbers import NumberUsed
from trainingcompiler.frameworks.pytorch.optimizers import parameters_of
from trainingcompiler.frameworks.pytorch.programs import ProgramCache
from trainingcompiler.frameworks.pytorch.recorder import user_line
from trainingcompiler.frameworks.pytorch.replaying import undeferred
from trainingcompiler.frameworks.pytorch.state import input_array, seed_array
from trainingcompiler.frameworks.pytorch.structure import flatten, unflatten
from trainingcompiler.frameworks.pytorch.tape import Ambient, Entry, Input, Slot
from trainingcompiler.frameworks.pytorch.torch_compile import left_out
from trainingcompiler.frameworks.pytorch.turns import turns_on
from trainingcompiler.frameworks.pytorch.workers import averages_unseen
from trainingcompiler.statistics import current as statistics
from trainingcompiler.targets import Target


class CompiledStep:
    """A train step that runs as one compiled program per signature of its arguments.

    The first call runs in torch: it creates the optimizer's state, and shows which modules and optimizers the function
    reaches.
    """

    def __init__(self, train_step: Callable, config: TrainingCompilerConfig):
        functools.update_wrapper(self, train_step)
        self._function = train_step
        self._book = OptimizerBook(config.keep_gradients)
        self._programs = ProgramCache(self._book, Target.of(config))
        self._watch = ModuleWatch()
        self._fallbacks = Fallbacks(config)
        self._choice = EngineChoice(engine_of(config, self._programs.target), turns_on(self._programs))
        self._modules: list[nn.Module] = []
        self._optimizers: list[torch.optim.Optimizer] = []
        self._results: dict[tuple, tuple] = {}
        self._is_eager = config.engine == "eager"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Does one step, and returns what the function returns.

        Raises:
            UsageError: The function reaches no optimizer, or changes no parameter.
            FallbackError: It cannot be compiled, and `fallback="error"`.
        """
        if planner.current is not None:
            planner.current.left("it is a function given to tc.compile, whose first call runs in PyTorch")
        if not self._optimizers:
            result = self._observe(args, kwargs)
        elif self._is_eager or not self._choice.defers or self._is_watched():
            with undeferred():
                result = self._function(*args, **kwargs)
            self._finished("eager")
        else:
            result = self._run(args, kwargs)
        return result

    def _is_watched(self) -> bool:
        if torch.is_anomaly_enabled():
            self._fallbacks.say(CaptureError(ANOMALY, user_line()))
        return torch.is_anomaly_enabled()

    def _observe(self, args: tuple, kwargs: dict) -> Any:
        modules: dict[int, nn.Module] = {}
        stepped: dict[int, torch.optim.Optimizer] = {}

        def note_module(module: nn.Module, _: Any) -> None:
            modules[id(module)] = module

        def note_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            stepped[id(optimizer)] = optimizer

        of_modules = register_module_forward_pre_hook(note_module)
        of_steps = register_optimizer_step_post_hook(note_step)
        try:
            with undeferred(), left_out(), warnings.catch_warnings():  # Dynamo would see, and compile, our two hooks
                warnings.filterwarnings("ignore", "Using `torch.compile.module.` when there are global hooks")  # ours
                result = self._function(*args, **kwargs)
        finally:
            of_modules.remove()
            of_steps.remove()
        name = getattr(self._function, "__name__", "the function")
        if not stepped:
            raise UsageError(
                f"tc.compile({name}): {name} has run once and has called no optimizer.step(), so there is no training "
                "step to compile. Pass the function that does forward, backward and optimizer.step()."
            )
        optimizers = list(stepped.values())
        if not any(p.grad is not None or o.state for o in optimizers for g in o.param_groups for p in g["params"]):
            raise UsageError(
                f"tc.compile({name}): {name} has called optimizer.step(), but no parameter had a gradient, so nothing "
                "was trained. Call loss.backward() inside the function."
            )
        parts = {id(part) for module in modules.values() for part in module.modules() if part is not module}
        self._modules = [module for key, module in modules.items() if key not in parts]
        self._watch.start()
        weakref.finalize(self, self._watch.stop).atexit = False
        tensor_hooks.watch_gradients(self._book)  # the step stores none that it clears itself at its next call
        weakref.finalize(self, tensor_hooks.unwatch_gradients, self._book).atexit = False
        self._optimizers = optimizers
        for optimizer in optimizers:
            self._book.register(optimizer)
            self._book.habits(optimizer).clears = all(
                p.grad is None for group in optimizer.param_groups for p in group["params"]
            )
        if any(isinstance(module, DistributedDataParallel) and averages_unseen(module) for module in modules.values()):
            reason = "DistributedDataParallel in a function given to tc.compile averages in torch only"
            self._fallbacks.leave(CaptureError(f"{reason}; run the plain loop under the launcher", user_line()), [self])
            self._is_eager = True
        self._finished("eager")
        return result

    def _run(self, args: tuple, kwargs: dict) -> Any:
        try:
            with undeferred():
                result = self._run_program(args, kwargs)
        except CaptureError as error:
            return self._fall_back(error, args, kwargs)
        self._finished("xla")
        return result

    def _run_program(self, args: tuple, kwargs: dict) -> Any:
        leaves, structure = flatten((args, kwargs))
        encoded = [_encode(leaf) for leaf in leaves]
        kinds = tuple((leaf.shape, leaf.dtype) if isinstance(leaf, Input) else _constant(leaf) for leaf in encoded)
        prints = tuple(self._watch.fingerprint(module) for module in self._modules)
        unsteady = next((fingerprint.unsteady for fingerprint in prints if fingerprint.unsteady), None)
        if unsteady:
            raise CaptureError(f"{unsteady} is another number at every step, and the forward decides by its value")
        ambient = Ambient.now()
        key = ((self._function, prints), structure, kinds, ambient)
        entry = Entry(
            self._function,
            structure,
            encoded,
            ambient,
            key,
            outputs=None,
            where=user_line(),
            optimizers=tuple(self._optimizers),
            modules=tuple(self._modules),
            prints=prints,
            device=devices.of(parameters_of(self._optimizers[0])) or devices.CPU,
        )
        entry.seed = Input(seed_array(entry.device), (), torch.int64)
        known = self._results.get(key)
        if known is not None:
            template, metas = known
            entry.outputs = [Slot(meta, entry.device) for meta in metas]
        while True:
            try:
                self._programs.run([entry], entry.outputs or [], Purpose.COMMIT)
                break
            except NumberUsed as error:
                if not self._make_constant(error.source, entry):
                    raise CaptureError(
                        reason="the step decides by the value of a number that is computed in it"
                    ) from None
                entry.outputs = None
        if known is None:
            assert entry.result is not None and entry.outputs is not None
            structure, leaves = entry.result
            positions = {slot: index for index, slot in enumerate(entry.outputs)}
            template = (
                structure,
                [positions.get(leaf) if isinstance(leaf, Slot) else leaf for leaf in leaves],
                [isinstance(leaf, Slot) for leaf in leaves],
            )
            self._results[entry.key] = template, [slot.meta for slot in entry.outputs]
        structure, items, are_outputs = template
        return unflatten(
            structure,
            iter([entry.outputs[i].value if is_output else i for i, is_output in zip(items, are_outputs, strict=True)]),
        )

    def _make_constant(self, source: Any, entry: Entry) -> bool:
        if source is None:
            return False
        if source.host is None:
            return self._book.fix_number(source.optimizer(), source.position)
        self._watch.fix_number(source.host)
        entry.prints = tuple(fingerprint.with_constant(source.host) for fingerprint in entry.prints)
        entry.key = ((entry.key[0][0], entry.prints), *entry.key[1:])
        return True

    def _fall_back(self, error: CaptureError, args: tuple, kwargs: dict) -> Any:
        self._fallbacks.leave(error, [self])
        self._is_eager = self._fallbacks.covers(self)
        with undeferred():
            result = self._function(*args, **kwargs)
        self._finished("eager")
        return result

    def _finished(self, engine: str) -> None:
        statistics().step_finished(engine, time.monotonic())
        self._choice.stepped(self._optimizers[0], engine)


def _encode(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor) and not leaf.requires_grad:
        return Input(input_array(leaf), tuple(leaf.shape), leaf.dtype, device=leaf.device)
    return leaf


def _constant(leaf: Any) -> Any:
    return id(leaf) if isinstance(leaf, torch.Tensor | nn.Module) else (type(leaf), leaf)
