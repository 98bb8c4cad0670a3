"""The recording: every path of calls that a script has taken, as a tree.

All of the script's Python runs at every step, and each torch function that it calls is compared with the call that
followed last time. The same: its results are known without running anything. Another one: the path branches. So the
place in the tree is all that decides which program a tape is, and nothing that the script's Python depends on has to be
known: it has been run.
"""

import weakref
from typing import Any

import torch

from trainingcompiler.errors import CaptureError
from trainingcompiler.frameworks.pytorch.interop.source_lines import user_line
from trainingcompiler.frameworks.pytorch.tape.call_key import CallKey, StateKey, constant_key, is_plain
from trainingcompiler.frameworks.pytorch.tape.call_shape import CallShape

_MOST_BRANCHES = 64  # at one call; beyond, the oldest are forgotten, with their programs
_FEW_DEAD = 64  # tensors that are gone before the tree is searched for calls on them


class Call:
    """One call on a path of the recording.

    Attributes:
        key: What tells it from other calls.
        where: The script's line.
        numbers: Positions of leaves that are floats which change from run to run.
        shape: What the call returns.
        failure: Why it cannot be recorded, if that was found out.
        pieces: The Python that a backward runs, in order, once that is known; see `backward_order`.
        programs: What has been compiled of paths that end here.
        backward_follows: False where a look at a value here was not followed by its `backward()`.
        wrong_guesses: How often it was not.
        children: The calls that have followed, by key.
        last: The one that followed last.
        depth: How many calls are before it.
        loop: What is called up to here, whatever the shapes and constants.
    """

    __slots__ = (
        "__weakref__",
        "backward_follows",
        "children",
        "depth",
        "failure",
        "key",
        "last",
        "loop",
        "numbers",
        "pieces",
        "programs",
        "shape",
        "where",
        "wrong_guesses",
    )

    def __init__(self, key: CallKey, parent: "Call | None"):
        self.key = key
        self.where: str | None = None
        self.numbers: tuple[int, ...] = ()
        self.shape: CallShape | None = None
        self.failure: CaptureError | None = None
        self.pieces: tuple[tuple[int, bytes | int], ...] | None = None
        self.programs: dict[Any, list] = {}
        self.children: dict[CallKey, Call] = {}
        self.backward_follows: bool | None = None
        self.wrong_guesses = 0
        self.last: Call | None = None
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.loop = 0 if parent is None else loop_of(parent, key.function)


class Recording:
    """The tree, and the tensors that its calls know by identity.

    Attributes:
        root: Where every tape begins.
        shapes: What calls return, by what that depends on.
    """

    def __init__(self):
        self.root = Call(CallKey(None, None, (), None), None)
        self.shapes: dict[tuple, CallShape] = {}
        self._tensors: dict[int, tuple[weakref.ref, StateKey, StateKey]] = {}
        self._objects: dict[int, tuple[weakref.ref, StateKey]] = {}
        self._floats: dict[int, dict[int, float]] = {}
        self._changing_floats: dict[int, set[int]] = {}
        self._fixed: dict[int, set[int]] = {}
        self._count = 0
        self._dead: set[int] = set()

    def tensor_key(self, tensor: torch.Tensor) -> StateKey:
        """The key of a tensor that is known by identity."""
        known = self._tensors.get(id(tensor))
        shape, strides = tensor.shape, tensor.stride()
        if known is None or known[0]() is not tensor:
            number = self._next_number()
            known = self._know(tensor, weakref.ref(tensor, lambda _: self._dead.add(number)), number)
        elif known[1].shape != shape or known[1].strides != strides or known[1].dtype is not tensor.dtype:
            known = self._know(tensor, known[0], known[1].number)  # `p.data = ...`
        return known[1] if tensor.requires_grad else known[2]

    def _know(self, tensor: torch.Tensor, reference: weakref.ref, number: int) -> tuple:
        key = StateKey(number, tensor.shape, tensor.stride(), tensor.dtype, True)
        known = self._tensors[id(tensor)] = reference, key, key._replace(requires_grad=False)
        return known

    def _next_number(self) -> int:
        self._count += 1
        return self._count

    def object_key(self, leaf: Any) -> tuple:
        """The key of an object that is no tensor: of its identity, or its value if it is a plain one."""
        if is_plain(leaf):
            return constant_key(leaf)
        known = self._objects.get(id(leaf))
        if known is None or known[0]() is not leaf:
            number = self._next_number()
            try:
                reference = weakref.ref(leaf, lambda _: self._dead.add(number))
            except TypeError:
                return (type(leaf), leaf)  # cannot be referred to weakly: a plain value of some kind
            known = self._objects[id(leaf)] = reference, StateKey(number, type(leaf))
        return known[1]

    def follow(self, parent: Call, key: CallKey, leaves: list[Any]) -> Call:
        """The call that follows `parent`, made if this path is new.

        Args:
            parent: The last call of the tape.
            key: What is called; a float's key has its value.
            leaves: What the call is given.
        """
        last = parent.last
        if last is not None:
            if last.key == key:
                return last
            has_numbers = last.numbers and last.key.structure == key.structure
            if has_numbers and key.with_numbers(last.numbers, leaves) == last.key:
                return last
        return self._branch(parent, key, leaves)

    def _branch(self, parent: Call, key: CallKey, leaves: list[Any]) -> Call:
        try:
            hash(key)
        except TypeError:
            odd = next(leaf for leaf in leaves if not _is_hashable(leaf))
            called = getattr(key.function, "__name__", key.function)
            raise CaptureError(f"a {type(odd).__name__} is passed to {called}", user_line()) from None
        known = parent.children.get(key)
        if known is None:
            numbers = self._changing(parent, key.function, leaves)
            if numbers:
                key = key.with_numbers(numbers, leaves)
                known = parent.children.get(key)
            if known is None:
                known = Call(key, parent)
                known.numbers, known.where = numbers, user_line()
                self._forget_old(parent)
                parent.children[key] = known
        else:
            parent.children[key] = parent.children.pop(key)  # the newest is the last to be forgotten
        parent.last = known
        return known

    def _changing(self, parent: Call, function: Any, leaves: list[Any]) -> tuple[int, ...]:
        """The positions of floats that are others than they were the last time that a loop came to this call.

        Asked of the loop and not of the path, or a loop with ten such numbers would be ten paths.
        """
        loop = loop_of(parent, function)
        floats = {index: leaf for index, leaf in enumerate(leaves) if type(leaf) is float}
        if not floats:
            return ()
        before = self._floats.get(loop, {})
        changing = self._changing_floats.setdefault(loop, set())
        changing |= {index for index, value in floats.items() if before.get(index, value) != value}
        self._floats[loop] = floats
        fixed = self._fixed.get(loop, set())
        return tuple(index for index in sorted(changing) if index not in fixed and floats.get(index, 0.0) != 0.0)

    def _forget_old(self, parent: Call) -> None:
        while len(parent.children) >= _MOST_BRANCHES:
            del parent.children[next(iter(parent.children))]
        if len(self._dead) >= _FEW_DEAD:
            dead, self._dead = self._dead, set()
            _prune(self.root, dead)
            self._tensors = {key: known for key, known in self._tensors.items() if known[0]() is not None}
            self._objects = {key: known for key, known in self._objects.items() if known[0]() is not None}

    def fix_number(self, parent: Call, call: Call, position: int) -> None:
        """Makes a float a constant of programs, and of every later one like it."""
        self._fixed.setdefault(call.loop, set()).add(position)
        for key, child in list(parent.children.items()):
            if child.loop == call.loop and position in child.numbers:
                del parent.children[key]
                if parent.last is child:
                    parent.last = None


def loop_of(parent: Call, function: Any) -> int:
    """Identifies what is called up to here, whatever the shapes and constants."""
    return hash((parent.loop, getattr(function, "__qualname__", str(function))))


def _prune(call: Call, dead: set[int]) -> None:
    pending = [call]
    while pending:
        parent = pending.pop()
        for key, child in list(parent.children.items()):
            if any(type(leaf) is StateKey and leaf.number in dead for leaf in child.key.leaves):
                del parent.children[key]
                if parent.last is child:
                    parent.last = None
            else:
                pending.append(child)


def _is_hashable(leaf: Any) -> bool:
    try:
        hash(leaf)
    except TypeError:
        return False
    return True


def numbers_of(call: Call, leaves: list[Any]) -> tuple[int, ...]:
    """The positions whose floats are inputs in this run."""
    return tuple(index for index in call.numbers if type(leaves[index]) is float and leaves[index] != 0.0)
