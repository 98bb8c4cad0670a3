"""The options of XLA that a program needs on a target, each with the reason why."""

import functools
import os

import jax
import jaxlib
import numpy as np

from trainingcompiler.program import StepProgram
from trainingcompiler.targets.target import Target

PRODUCTS = "xla_gpu_enable_triton_gemm"
FUSIONS = "xla_cpu_experimental_ynn_fusion_type"
_SOUND_FUSIONS = "LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION,LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
_FIRST_UNSOUND = (0, 10, 2)  # of jaxlib


def options(program: StepProgram, target: Target) -> dict[str, bool | str]:
    """The options that a program needs on a target, by name; part of the key that its executable is found by."""
    needed = sound_fusions(target.platform)
    is_for_speed = target.platform == "cuda" and target.described is None and not program.saves_memory
    if is_for_speed and not _is_set(PRODUCTS):
        # XLA's own products, fused with what is around them, were slower on an H100 than cuBLAS's (27 and 24 ms a step
        # of GPT-2 small), and took longer to compile (22 and 11 s; a small GPT in float32, 52 and 5 s). They save
        # memory: 5.1 and 7.3 GB of temporaries. What is planned for a described GPU is the least that is needed.
        needed[PRODUCTS] = False
    if program.is_deterministic and target.platform == "cuda":  # on a CPU, XLA always is
        needed["xla_gpu_deterministic_ops"] = True
    if target.workers > 1 and target.platform == "cuda":
        # One of them compiles, and would wait for the others' share of the measurements.
        needed["xla_gpu_shard_autotuning"] = False
    if program.recomputes and target.platform == "cpu":
        needed |= _schedule_for_memory()
    return needed


def sound_fusions(platform: str) -> dict[str, bool | str]:
    """Turns XLA:CPU's fusions of sums into YNNPACK off, and leaves it single products and convolutions.

    From jaxlib 0.10.2 on they are on, and compute some programs wrongly, without a word: a product with a constant
    matrix that is summed, a product per row that is squared and summed; others end the process
    (https://github.com/jax-ml/jax/issues/39103, 39257 and 40412).
    """
    is_unsound = platform == "cpu" and jaxlib.version.__version_info__ >= _FIRST_UNSOUND
    return {FUSIONS: _SOUND_FUSIONS} if is_unsound and not _is_set(FUSIONS) else {}


def _is_set(option: str) -> bool:
    """Whether the person has said what it is to be."""
    return option in os.environ.get("XLA_FLAGS", "")


@functools.cache
def _schedule_for_memory() -> dict[str, bool | str]:
    """XLA:CPU's option for the schedule that needs least memory, by the name that this version of it knows.

    Its schedule for many threads computes again as soon as it can, and then keeps the results: GPT-2 with 10 layers x
    256, batch 8 x 512, checkpointed, has 2.0 GB of temporaries so, and 0.8 GB in the other order.
    """
    option: dict[str, bool | str] = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    try:
        jax.jit(lambda x: x).lower(jax.ShapeDtypeStruct((), np.float32)).compile(compiler_options=option)
    except jax.errors.JaxRuntimeError:
        return {"xla_cpu_enable_concurrency_optimized_scheduler": False}  # before jaxlib 0.10
    return option
