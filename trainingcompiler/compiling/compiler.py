"""Compiles a `StepProgram` ahead of time into an `Executable`."""

import contextlib
import functools
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from trainingcompiler.cache import jax_cache
from trainingcompiler.cache.executables import ExecutableStore, key_text
from trainingcompiler.cache.jax_cache import watching
from trainingcompiler.compiling.gc_pause import gc_paused
from trainingcompiler.compiling.memory import check as memory_check
from trainingcompiler.errors import NotEnoughMemoryError, TrainingCompilerError, UsageError
from trainingcompiler.parallel import spmd
from trainingcompiler.parallel.arrays import placed_arrays
from trainingcompiler.parallel.layer_rules import refuse
from trainingcompiler.parallel.sharding import mesh_of, shardings, undivided_rows, with_batch_found
from trainingcompiler.program import StepProgram, TensorSpec
from trainingcompiler.reporting import dump
from trainingcompiler.reporting.events import Note, emit, phase
from trainingcompiler.reporting.statistics import current as statistics
from trainingcompiler.targets.target import Target, compiling_for
from trainingcompiler.targets.xla_options import PRODUCTS, options


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """What one run of an executable needs, in bytes, as XLA planned it before step 1.

    Attributes:
        argument_bytes: State and inputs.
        output_bytes: New state and outputs.
        alias_bytes: The part of the outputs that lives in argument buffers.
        temporary_bytes: Everything else that is alive at the worst moment.
    """

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temporary_bytes: int

    @property
    def added_bytes(self) -> int:
        """What a run takes on top of its arguments, which exist before it."""
        return self.output_bytes - self.alias_bytes + self.temporary_bytes

    @property
    def peak_bytes(self) -> int:
        """Arguments, outputs that are not aliased, and temporaries together."""
        return self.argument_bytes + self.added_bytes


@dataclass(frozen=True, kw_only=True, slots=True, weakref_slot=True)
class Executable:
    """A compiled program. Calling it donates the state.

    Attributes:
        program: What was compiled.
        target: What it was compiled for. One for a described GPU can be looked at, and not called.
        compile_time_s: Seconds from StableHLO to machine code, or to the cached executable.
        memory: XLA's memory plan.
        compiled: The JAX object that runs.
        state_shardings: Where each array of the state has to be; None on one device.
        input_shardings: Where each input is brought; None on one device.
    """

    program: StepProgram
    target: Target
    compile_time_s: float
    memory: MemoryPlan
    compiled: Any
    state_shardings: tuple | None = None
    input_shardings: tuple | None = None

    def __call__(self, state: tuple, inputs: tuple) -> tuple[tuple, tuple]:
        """Runs the program.

        Args:
            state: Arrays as `program.state` describes them, where `state_shardings` says. They are consumed: their
                buffers become the new state.
            inputs: Arrays as `program.inputs` describes them, wherever they are; they stay valid.

        Returns:
            `(new_state, outputs)`. The arrays may still be computing.

        Raises:
            UsageError: It was compiled for a described GPU.
        """
        if self.target.described is not None:
            raise UsageError(
                f"{self.program.name} was compiled for a described {self.target.description}, which cannot run it: "
                "look at its memory plan and its text, or compile it for Target.local()"
            )
        if self.input_shardings is not None:
            inputs = placed_arrays(inputs, self.input_shardings)
        return self.compiled(state, inputs)

    def as_text(self) -> str:
        """The optimized program in XLA's own language."""
        return self.compiled.as_text()


def compile(program: StepProgram, target: Target | None = None, *, checks_memory: bool = True) -> Executable:
    """Lowers and compiles a program.

    Args:
        program: The step. Its state is donated, each array to its own successor.
        target: What to compile it for; None is the local device.
        checks_memory: Whether to fail if the local device cannot give the memory that the program plans with.

    Returns:
        The executable, with its memory plan.

    Raises:
        TrainingCompilerError: XLA did not accept the identity alias map, so that state would exist twice.
        UsageError: The target is a described GPU, and XLA's compiler for GPUs is not installed.
        UsageError: Devices are to share layers, and no rule says how.
        NotEnoughMemoryError: See `checks_memory`.
    """
    target = target or Target.local()
    devices = target.devices()
    placed: tuple[tuple | None, tuple | None, tuple] = None, None, ()
    if devices is not None:
        program = with_batch_found(program)
        _check_layers(program, target)
        _say_undivided(program, target)
        placed = shardings(program, mesh_of(devices, target.strategy), target.strategy)
    elif target.workers > 1:
        placed = tuple(map(_of_workers, program.state)), tuple(map(_of_workers, program.inputs)), ()
    if program.digest is not None:
        dump.stage(program.name, "cache key", lambda: key_text(program, target))
    store = jax_cache.store() if program.digest is not None and target.described is None else None
    # Of several workers on a host, the first to come compiles, and the others load what it has made.
    with store.alone(program, target) if store and target.workers > 1 else contextlib.nullcontext():
        compiled, compile_time_s = (store and _kept(program, target, store)) or _made(program, target, placed, store)
    dump.stage(program.name, "hlo", compiled.as_text)
    analysis: Any = compiled.memory_analysis()
    memory = MemoryPlan(
        argument_bytes=analysis.argument_size_in_bytes,
        output_bytes=analysis.output_size_in_bytes,
        alias_bytes=analysis.alias_size_in_bytes,
        temporary_bytes=analysis.temp_size_in_bytes,
    )
    state_bytes = sum(map(_bytes_on_a_device, program.state, placed[0] or itertools.repeat(None)))
    if memory.alias_bytes < state_bytes:
        raise TrainingCompilerError(
            f"XLA updates only {memory.alias_bytes} of {state_bytes} bytes of the training state of {program.name} "
            "in place, so the rest would exist twice. This is a bug of trainingcompiler: please report it with the "
            "script, and run with --engine=eager until it is mended."
        )
    executable = Executable(
        program=program,
        target=target,
        compile_time_s=compile_time_s,
        memory=memory,
        compiled=compiled,
        state_shardings=placed[0],
        input_shardings=placed[1],
    )
    if target.described is None and checks_memory:
        try:
            memory_check(executable)
        except NotEnoughMemoryError:
            if not _would_need_less(program, target):
                raise
            emit(Note(text=f"{program.name} does not fit as XLA makes it fastest, and is compiled to need less memory"))
            return compile(replace(program, saves_memory=True), target)
    return executable


def _would_need_less(program: StepProgram, target: Target) -> bool:
    """Whether the program was compiled for speed, at the price of memory."""
    return PRODUCTS in options(program, target) and not program.saves_memory


def _kept(program: StepProgram, target: Target, store: ExecutableStore) -> tuple[Any, float] | None:
    if not store.has(program, target):
        return None
    start_s = time.perf_counter()
    with phase("load", program.name) as running:
        kept = store.load(program, target)
        load_time_s = time.perf_counter() - start_s
        if kept is not None:
            ready = ", loaded ahead" if kept.was_ready else ""
            running.detail += f", cache hit{ready}, saved {max(0.0, kept.making_time_s - load_time_s):.1f} s"
    if kept is None:
        return None
    statistics().cache_hits += 1
    return kept.compiled, load_time_s


def _made(program: StepProgram, target: Target, placed: tuple, store: ExecutableStore | None) -> tuple[Any, float]:
    """Lowers and compiles; what the store keeps, JAX's own cache need not keep as well."""
    start_s = time.perf_counter()
    state, inputs, outputs = placed
    # What the step returns besides its state and gradients, XLA places.
    where: dict[str, Any] = {}
    if state is not None:
        others = spmd.own() if target.workers > 1 else None
        where = {"in_shardings": (state, inputs), "out_shardings": (state, others)}
    function = _named(program, outputs)
    if target.workers > 1 and not program.tells_apart:
        function = functools.wraps(function)(spmd.each(function))
    with jax.enable_x64(True):
        with phase("lower", program.name), compiling_for(target), gc_paused():
            lowered = jax.jit(function, donate_argnums=0, keep_unused=True, **where).lower(
                _abstract(program.state), _abstract(program.inputs)
            )
        dump.stage(program.name, "stablehlo", lowered.as_text)
        compile_start_s = time.perf_counter()
        keeping: Any = _not_kept if store or target.described else contextlib.nullcontext()
        with phase("compile", program.name) as running, keeping:
            with watching() as outcome:
                compiled = lowered.compile(compiler_options=options(program, target))
            news = "not in the cache" if store else outcome.detail
            running.detail = ", ".join(filter(None, [running.detail, news]))
        compile_time_s = time.perf_counter() - compile_start_s
    statistics().cache_hits += bool(outcome.hit)
    if store is not None:
        store.save(program, target, compiled, time.perf_counter() - start_s)
    return compiled, compile_time_s


def _of_workers(spec: TensorSpec) -> Any:
    return spmd.divided(spec.shape) if spec.is_common else spmd.own()


def _bytes_on_a_device(spec: TensorSpec, sharding: Any) -> int:
    return prod(sharding.shard_shape(spec.shape) if sharding else spec.shape) * spec.dtype.itemsize


def _check_layers(program: StepProgram, target: Target) -> None:
    parameters = [spec for spec in program.state if spec.role == "parameter"]
    if target.strategy.tensor_parallel > 1 and parameters and all(spec.tensor_dim is None for spec in parameters):
        names = [spec.name for spec in parameters if not spec.name.startswith("state ")]
        raise refuse(program.name, names, target.strategy.tensor_parallel)


def _say_undivided(program: StepProgram, target: Target) -> None:
    rows = undivided_rows(program, target.device_count, target.strategy)
    if rows is None or target.described is not None or rows in _said:
        return
    _said.add(rows)
    data = target.device_count // target.strategy.tensor_parallel
    emit(
        Note(
            text=f"a batch of {rows} rows cannot be divided between {data} devices: each computes all of it, so such "
            f"a step takes as long as on one. Take a multiple of {data}, or drop_last=True for the last batch"
        )
    )


_said: set[int] = set()


def lowered(program: StepProgram) -> Any:
    """The program as JAX lowers it for this process's device: for a look at its text, or at the work in it.

    Args:
        program: The step.

    Returns:
        JAX's `Lowered`; its `cost_analysis()` counts each operator's arithmetic once, before any fusion.
    """
    with jax.enable_x64(True):
        return jax.jit(_named(program), donate_argnums=0, keep_unused=True).lower(
            _abstract(program.state), _abstract(program.inputs)
        )


class _NotKept:
    """Compiles without JAX's persistent cache: what it keeps for a device that is not there it cannot read again.

    JAX has one switch for all threads, several of which may compile at once: the first turns it off, the last on.
    """

    _NAME = "jax_enable_compilation_cache"

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._enabled = True

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._enabled = getattr(jax.config, self._NAME)
                self._switch(False)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._switch(self._enabled)

    def _switch(self, on: bool) -> None:
        jax.config.update(self._NAME, on)
        compilation_cache.reset_cache()  # whether there is one is asked once


_not_kept = _NotKept()


def _named(program: StepProgram, placed_outputs: tuple = ()) -> Callable:
    def function(state: tuple, inputs: tuple) -> tuple:
        new_state, outputs = program.function(state, inputs)
        placed = itertools.zip_longest(outputs, placed_outputs)
        constrain = jax.lax.with_sharding_constraint
        return new_state, tuple(x if where is None else constrain(x, where) for x, where in placed)

    function.__name__ = program.name  # the module's name in XLA's dumps, profiles and cache
    return function


def _abstract(specs: tuple[TensorSpec, ...]) -> tuple:
    return tuple(jax.ShapeDtypeStruct(spec.shape, np.dtype(spec.dtype)) for spec in specs)
