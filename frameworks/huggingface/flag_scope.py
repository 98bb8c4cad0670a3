"""Which trainers are compiled: all of them, or those whose arguments have the flag."""

from typing import Any

from trainingcompiler.frameworks import pytorch
from trainingcompiler.frameworks.pytorch.session.session import Session

_by_flag: Session | None = None


def is_enabled() -> bool:
    """Whether somebody has enabled compiling in this process already."""
    return pytorch.current_session() is not None


def only_flagged() -> None:
    """Notes that what is enabled now is enabled by a trainer's flag, for trainers that have it."""
    global _by_flag
    _by_flag = pytorch.current_session()


def compiles(arguments: Any) -> bool:
    """Whether the trainer with these arguments is compiled."""
    session = pytorch.current_session()
    if session is None:
        return False
    return session is not _by_flag or getattr(arguments, "training_compiler", False)
