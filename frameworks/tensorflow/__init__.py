"""The TensorFlow adapter: a train step that assigns variables becomes one XLA program."""

import warnings
from collections.abc import Callable

import jax
import tensorflow as tf

from trainingcompiler.cache import jax_cache
from trainingcompiler.config import TrainingCompilerConfig
from trainingcompiler.errors import UsageError
from trainingcompiler.frameworks.tensorflow import bridge, hooks, state
from trainingcompiler.frameworks.tensorflow.compiled_function import CompiledFunction
from trainingcompiler.processes import rendezvous
from trainingcompiler.reporting.events import Note, Started, emit
from trainingcompiler.targets.target import Target


def prepare(config: TrainingCompilerConfig, **versions: str) -> None:
    """Makes TensorFlow ready for compiled steps, and says with what they run.

    Args:
        config: The options.
        **versions: Of other packages, for the banner.

    Raises:
        UsageError: `engine="eager"`, which is PyTorch's.
        TrainingCompilerError: The installed TensorFlow cannot export a step.
    """
    if config.engine == "eager":
        raise UsageError(
            "engine=eager is for PyTorch. To have TensorFlow run its own steps: --engine=tensorflow, or "
            'TrainingCompilerConfig(engine="tensorflow")'
        )
    # JAX warns on every fork once it has started. Forked children (workers of a `PyDataset`) load data only.
    warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
    unknown = bridge.check_version()
    jax_cache.enable_persistent_cache(config.cache_dir, int(config.cache_size_gb * 1e9))
    hooks.install()
    compiled = config.engine != "tensorflow"
    target = Target.of(config)
    if compiled and (store := jax_cache.store()) is not None:
        store.begin(target)
    emit(
        Started(
            versions={"tensorflow": tf.__version__, **versions, "jax": jax.__version__},
            device=target.description,
            compiled=compiled,
            reason="" if compiled else "--engine=tensorflow says so",
        )
    )
    if unknown:
        emit(Note(text=unknown))
    if config.verify == "always":
        emit(Note(text="--verify=always compares programs of PyTorch; those of TensorFlow and Keras are not compared"))


def disable() -> None:
    """Leaves TensorFlow as it was; what has been computed stays. Functions that were compiled go on working."""
    state.give_back_all()


def compile(train_step: Callable, config: TrainingCompilerConfig) -> Callable:
    """Returns `train_step` as one compiled program per signature of its arguments; see `trainingcompiler.compile`."""
    rendezvous.refuse_several("A step of TensorFlow")
    prepare(config)
    return CompiledFunction(train_step, config)
