"""Options of the Trainer that exclude compiling: an error before training starts, with what to do."""

from typing import Any

from trainingcompiler.errors import UsageError

_CURES = {
    "torch_compile": "it compiles parts of the model with another compiler; leave it out, the whole step is compiled",
    "deepspeed": "it replaces backward() and step() by its own engine; leave it out, or run without trainingcompiler "
    "(--no-compile)",
    "fsdp": "it shards the model by itself; leave it out, or run without trainingcompiler (--no-compile)",
    "auto_find_batch_size": "it looks for a batch size by running out of memory, and every try would be compiled; set "
    "per_device_train_batch_size",
    "use_liger_kernel": "its Triton kernels cannot be compiled into the step; leave it out, XLA fuses operators itself",
}


def check(arguments: Any) -> None:
    """Fails if an option excludes compiling.

    Args:
        arguments: Any `transformers.TrainingArguments`.

    Raises:
        UsageError: At least one does; all of them are named.
    """
    found = [
        f"{name}={getattr(arguments, name)!r}: {cure}" for name, cure in _CURES.items() if _is_set(arguments, name)
    ]
    if found:
        raise UsageError("\n  - ".join(["these training arguments cannot be used with trainingcompiler:", *found]))


def _is_set(arguments: Any, name: str) -> bool:
    value = getattr(arguments, name, None)
    return bool(value)
