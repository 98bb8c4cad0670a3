"""`TrainingArguments` with one more field: the stock Trainer then trains compiled."""

from dataclasses import dataclass, field

import transformers

import trainingcompiler
from trainingcompiler.frameworks.huggingface import flag_scope
from trainingcompiler.frameworks.huggingface.conflicts import check

_HELP = "Whether to compile each training step into one XLA program. Needs no other change."


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """The arguments of the Trainer, and whether to compile.

    With the flag, making the arguments does what `trainingcompiler.enable()` does, options from the environment
    included. Trainers whose arguments do not have it stay as they are.

    Attributes:
        training_compiler: Whether to compile each training step into one XLA program.

    Raises:
        UsageError: Another option is set that excludes it; the message says what to do.
    """

    training_compiler: bool = field(default=False, metadata={"help": _HELP})

    def __post_init__(self) -> None:
        super().__post_init__()
        _start(self)


@dataclass
class Seq2SeqTrainingArguments(transformers.Seq2SeqTrainingArguments):
    """As `TrainingArguments`, for the Seq2SeqTrainer.

    Attributes:
        training_compiler: Whether to compile each training step into one XLA program.

    Raises:
        UsageError: As for `TrainingArguments`.
    """

    training_compiler: bool = field(default=False, metadata={"help": _HELP})

    def __post_init__(self) -> None:
        super().__post_init__()
        _start(self)


def _start(arguments: TrainingArguments | Seq2SeqTrainingArguments) -> None:
    if not arguments.training_compiler:
        return
    check(arguments)
    if not flag_scope.is_enabled():
        trainingcompiler.enable()
        flag_scope.only_flagged()
