"""Installs the session in torch: the few places where a training loop talks to its model, and nothing else."""

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._functorch import apis, eager_transforms
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils import checkpoint

from trainingcompiler.adapters.patches import Patches
from trainingcompiler.frameworks.pytorch.interop.critical_section import section
from trainingcompiler.frameworks.pytorch.interop.passthrough import passthrough
from trainingcompiler.frameworks.pytorch.interop.pytree import map_leaves
from trainingcompiler.frameworks.pytorch.patches import gradient_property
from trainingcompiler.frameworks.pytorch.session import ddp
from trainingcompiler.frameworks.pytorch.session.checkpoint_regions import noting
from trainingcompiler.frameworks.pytorch.session.first_step_watch import FirstStepWatch
from trainingcompiler.frameworks.pytorch.session.session import Session


class Hooks:
    """torch's own functions, and ours in their place while installed."""

    def __init__(self, session: Session):
        self.session = session
        self._watch = FirstStepWatch(session)
        self._patches = Patches()

    def install(self) -> None:
        """Puts the session between the loop and torch."""
        self._hook_modules()
        self._hook_optimizers()
        self._hook_clipping()
        self._hook_scaler()
        torch_compile = self.session.torch_compile
        self._patches.replace(
            torch,
            "compile",
            torch_compile.hooked(torch.compile, gradient_property.skipped_by_dynamo),
            "a recorded step reads what was given to it as it is written",
        )
        torch_compile.begin()
        if self.session.workers is not None:
            self._hook_workers()
        self._hook_functions()
        gradient_property.watch_gradients(self.session.gradients)
        section.watch_signals()
        self.session.is_closed = False
        self.session.deferring = self.session.deferring  # which puts the mode up

    def uninstall(self) -> None:
        """Leaves torch as it was."""
        self.session.is_closed = True
        self.session.mode.come_down()
        section.unwatch_signals()
        gradient_property.unwatch_gradients(self.session.gradients)
        self.session.torch_compile.end()
        self._patches.restore()

    def _hook_modules(self) -> None:
        session = self.session
        original_call, original_state_dict = nn.Module.__call__, nn.Module.state_dict
        original_apply = nn.Module._apply

        def call(module, *args, **kwargs):
            if session.depth:  # part of a call that is being recorded
                return original_call(module, *args, **kwargs)
            return session.module_calls.call(original_call, module, args, kwargs)

        @functools.wraps(original_state_dict)
        def state_dict(module, *args, **kwargs):
            session.state_is_read()
            return original_state_dict(module, *args, **kwargs)

        @functools.wraps(original_apply)
        def apply(module, *args, **kwargs):  # what moves and casts: it asks for each gradient, if there is one
            session.state_is_read()
            with passthrough():
                return original_apply(module, *args, **kwargs)

        self._patches.replace(nn.Module, "_apply", apply, "it moves and casts: state and gradients have to be torch's")
        self._patches.replace(
            nn.Module, "__call__", self._watch.watched(call), "a call of a module is where recording begins"
        )
        self._patches.replace(nn.Module, "state_dict", state_dict, "it reads the state, which has to be torch's")

    def _hook_optimizers(self) -> None:
        session = self.session
        original_add, original_patch = Optimizer.add_param_group, Optimizer._patch_step_function

        def add_param_group(optimizer, param_group):
            session.makes_leaves(param_group)
            original_add(optimizer, param_group)
            self._watch.made(optimizer)
            session.registry.register(optimizer)

        def patch_step_function(optimizer):
            original_patch(optimizer)
            self._hook_step(type(optimizer))
            if "param_groups" in vars(optimizer):  # not a new one: a state has been loaded
                session.registry.register(optimizer)
                session.registry.habits(optimizer).was_loaded = True

        self._patches.replace(Optimizer, "add_param_group", add_param_group, "which optimizer trains which parameters")
        self._patches.replace(
            Optimizer,
            "_patch_step_function",
            patch_step_function,
            "optimizers of new classes, and states that are loaded",
        )
        for kind in _subclasses(Optimizer):
            self._hook_step(kind)

    def _hook_step(self, kind: type[Optimizer]) -> None:
        """Hooks `step` where the class or a parent defines it."""
        session, watch = self.session, self._watch
        owner = next(parent for parent in kind.__mro__ if "step" in parent.__dict__)
        original = owner.__dict__["step"]
        if owner is Optimizer or getattr(original, "defers", False) or _wraps_another(kind, owner):
            return
        if not getattr(original, "hooked", False):  # torch does this when the first optimizer of the class is made
            original = Optimizer.profile_hook_step(original)
            vars(original)["hooked"] = True
            setattr(owner, "step", original)  # noqa: B010

        @functools.wraps(original)
        def step(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            if not watch.is_over:
                watch.steps()
            return session.stepping.step(optimizer, original, args, kwargs)

        # `hooked` keeps torch from wrapping it again: its own profiling wrapper is inside, in `original`.
        vars(step).update(defers=True, hooked=True)
        self._patches.replace(owner, "step", step, "the end of a step")

    def _hook_functions(self) -> None:
        """Hooks what runs the script's Python and is no torch function: `autograd.Function`, scripted functions."""
        session = self.session
        apply = vars(torch.autograd.Function)["apply"].__func__

        def recorded(kind: type, *args: Any, **kwargs: Any) -> Any:
            return session.apply(apply, kind, args, kwargs)

        self._patches.replace(
            torch.autograd.Function, "apply", classmethod(recorded), "no torch function: its Python is recorded"
        )
        scripted = torch.jit.ScriptFunction.__call__

        def call(function: Any, *args: Any, **kwargs: Any) -> Any:
            return session.call_unseen(function, scripted, (function, *args), kwargs)

        self._patches.replace(torch.jit.ScriptFunction, "__call__", call, "no torch function: it gets values")
        for owner in (torch.jit, torch.jit._trace):
            self._patches.replace(
                owner, "trace_module", self._in_torch(torch.jit.trace_module), "tracing runs modules for itself"
            )
        self._patches.replace(
            torch.jit._trace,
            "_trace_impl",
            self._in_torch(torch.jit._trace._trace_impl),
            "tracing runs modules for itself",
        )
        generator = "_checkpoint_without_reentrant_generator"
        self._patches.replace(
            checkpoint,
            generator,
            noting(session, getattr(checkpoint, generator)),
            "where a checkpointed block begins and ends",
        )
        swap = torch.utils.swap_tensors
        self._patches.replace(
            torch.utils,
            "swap_tensors",
            functools.wraps(swap)(lambda t1, t2: session.results.swap(swap, t1, t2)),
            "it refuses tensors to which somebody refers weakly, as we do to all that train",
        )
        for name in ("grad_and_value_impl", "_vjp_with_argnums", "_jvp_with_argnums"):
            self._patches.replace(
                eager_transforms,
                name,
                self._transforming(getattr(eager_transforms, name)),
                "torch.func's transforms look at tensors in C++",
            )
        self._patches.replace(
            apis, "vmap_impl", self._transforming(apis.vmap_impl), "torch.func's transforms look at tensors in C++"
        )

    def _hook_clipping(self) -> None:
        """Hooks the functions inside torch's `no_grad` wrappers, which scripts may have imported by name already."""
        for name in ("clip_grad_norm_", "clip_grad_value_"):
            wrapper = getattr(torch.nn.utils, name)
            cell = wrapper.__closure__[wrapper.__code__.co_freevars.index("func")]
            original = cell.cell_contents
            self._patches.replace(cell, "cell_contents", self._clipping(original), "clipping is part of the step")

    def _hook_scaler(self) -> None:
        session = self.session
        unscale, step = GradScaler.unscale_, GradScaler.step

        @functools.wraps(unscale)
        def unscale_(scaler, optimizer):
            session.stepping.unscale(unscale, scaler, optimizer)

        @functools.wraps(step)
        def scaled_step(scaler, optimizer, *args, **kwargs):
            return session.stepping.scaled_step(step, scaler, optimizer, args, kwargs)

        self._patches.replace(
            GradScaler, "unscale_", unscale_, "whether gradients are finite is decided in the program"
        )
        self._patches.replace(GradScaler, "step", scaled_step, "whether gradients are finite is decided in the program")

    def _hook_workers(self) -> None:
        talk = ddp.DistributedPatches(self.session)
        for name in (*ddp.TALKING, *ddp.WAITING) if dist.is_available() else ():
            hooked = talk.hooked(getattr(dist, name))
            for owner in (dist, dist.distributed_c10d):
                self._patches.replace(owner, name, hooked, "workers of a divided state do the same together")
        batch_norm = ddp.synchronized_batch_norm(nn.SyncBatchNorm.forward)
        self._patches.replace(
            nn.SyncBatchNorm, "forward", batch_norm, "the statistics of all workers are part of the program"
        )
        if not torch.cuda.is_available():  # the wrapper refuses torch's own on a CPU; ours is in place there
            self._patches.replace(
                DistributedDataParallel,
                "_passing_sync_batchnorm_handle",
                lambda wrapper, module: None,
                "torch's own refuses a CPU",
            )

    def _in_torch(self, original):
        """A function that runs modules to see what they ask torch for."""
        session = self.session

        @functools.wraps(original)
        def run(*args: Any, **kwargs: Any) -> Any:
            session.state_is_read()
            with passthrough():
                return original(*args, **kwargs)

        return run

    def _transforming(self, original):
        session = self.session

        @functools.wraps(original)
        def transform(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = map_leaves(session.transformed, (args, kwargs))
            return original(*args, **kwargs)

        return transform

    def _clipping(self, original):
        session = self.session

        @functools.wraps(original)
        def clip(*args: Any, **kwargs: Any) -> Any:
            return session.stepping.clip(original, args, kwargs)

        return clip


def _wraps_another(kind: type[Optimizer], owner: type) -> bool:
    """Whether optimizers of a class hand `step` on to another one, which is the one to watch.

    Accelerate's has the groups of the inner one as a property; Lightning's takes `step` from a class of its own.
    """
    return isinstance(getattr(kind, "param_groups", None), property) or not issubclass(owner, Optimizer)


def _subclasses(kind: type[Optimizer]) -> list[type[Optimizer]]:
    found: list[type[Optimizer]] = []
    for child in kind.__subclasses__():
        found += [child, *_subclasses(child)]
    return found
