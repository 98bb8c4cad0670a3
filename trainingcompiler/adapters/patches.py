"""What we have put in the place of something in a library, as a list; each goes when it is still ours.

Another library, or the script, may have wrapped a function of ours since. Then that stays where it is: what it calls of
ours does what the library's own would, since nobody listens any more.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from types import CellType, ModuleType
from typing import Any

_NOTHING = object()


@dataclass(frozen=True, eq=False)
class Patch:
    """One replacement.

    Attributes:
        owner: The class, module or closure cell that has the attribute.
        name: The attribute.
        new: What is there now.
        old: What was there before; `_NOTHING` where the owner had inherited it.
        why: What it is needed for, as a list shows it.
        upstream: The version or the issue after which it can go; empty where it is needed for good.
    """

    owner: Any
    name: str
    new: Any
    old: Any
    why: str
    upstream: str = ""

    def __str__(self) -> str:
        owner = self.owner
        if isinstance(owner, CellType):
            where = f"{self.old.__module__}.{self.old.__qualname__}"
        elif isinstance(owner, ModuleType):
            where = f"{owner.__name__}.{self.name}"
        else:
            where = f"{owner.__module__}.{owner.__qualname__}.{self.name}"
        return f"{where}: {self.why}" + (f" ({self.upstream})" if self.upstream else "")

    @property
    def is_in_place(self) -> bool:
        """Whether nobody has replaced it since."""
        return _current(self.owner, self.name) is self.new


_in_force: list[Patch] = []


class Patches:
    """The patches of one adapter, which come and go together."""

    def __init__(self) -> None:
        self._made: list[Patch] = []

    def __bool__(self) -> bool:
        return bool(self._made)

    def replace(self, owner: Any, name: str, new: Any, why: str, upstream: str = "") -> None:
        """Puts `new` in the place of an attribute.

        Args:
            owner: The class, module or closure cell that has it, or inherits it.
            name: The attribute.
            new: What to put there.
            why: What it is needed for.
            upstream: The version or the issue after which it can go.
        """
        patch = Patch(owner, name, new, _current(owner, name), why, upstream)
        setattr(owner, name, new)
        self._made.append(patch)
        _in_force.append(patch)

    def restore(self) -> None:
        """Takes back what is still ours, the last first."""
        for patch in reversed(self._made):
            _in_force.remove(patch)
            if not patch.is_in_place:
                continue
            if patch.old is _NOTHING:
                delattr(patch.owner, patch.name)
            else:
                setattr(patch.owner, patch.name, patch.old)
        self._made.clear()


def in_force() -> Iterator[Patch]:
    """All patches of this process, in the order in which they were made."""
    yield from _in_force


def _current(owner: Any, name: str) -> Any:
    return owner.cell_contents if isinstance(owner, CellType) else vars(owner).get(name, _NOTHING)
