"""The Hugging Face adapter: what the Trainer, Accelerate and `generate` add to an ordinary PyTorch loop.

The loop itself is compiled by the PyTorch adapter. Here stand the few places where these libraries ask for values, or
for gradients, in the middle of a step; the flag of `TrainingArguments`; and length buckets.
"""

from typing import TYPE_CHECKING, Any

from trainingcompiler.config import TrainingCompilerConfig
from trainingcompiler.frameworks.huggingface.hooks import Hooks

if TYPE_CHECKING:
    from trainingcompiler.frameworks.huggingface.arguments import Seq2SeqTrainingArguments, TrainingArguments

__all__ = ["Seq2SeqTrainingArguments", "TrainingArguments", "disable", "enable"]

_hooks: Hooks | None = None


def enable(config: TrainingCompilerConfig) -> None:
    """Hooks what has been imported of Accelerate and transformers; called again when more of it has been.

    Args:
        config: The options; `engine="eager"` needs no hooks.
    """
    global _hooks
    if config.engine != "eager":
        _hooks = _hooks or Hooks()
        _hooks.install()


def disable() -> None:
    """Leaves both as they were."""
    global _hooks
    hooks, _hooks = _hooks, None
    if hooks is not None:
        hooks.uninstall()


def __getattr__(name: str) -> Any:
    if name in ("TrainingArguments", "Seq2SeqTrainingArguments"):  # they import transformers
        from trainingcompiler.frameworks.huggingface import arguments

        return getattr(arguments, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
