"""The recording: every path of calls that a script has taken, as a tree.

All of the script's Python runs at every step, and each torch function that it calls is compared with the call that
followed last time. The same: its results are known without running anything. Another one: the path branches. So the
place in the tree is all that decides which program a tape is, and nothing that the script's Python depends on has to be
known: it has been run.
"""

import enum
import math
import weakref
from collections.abc import Callable
from typing import Any

import torch

from trainingcompiler.errors import CaptureError
from trainingcompiler.frameworks.pytorch.interop.pytree import TreeDef
from trainingcompiler.frameworks.pytorch.interop.source_lines import user_line
from trainingcompiler.frameworks.pytorch.interop.torch_modes import TorchModes
from trainingcompiler.frameworks.pytorch.tape.call_shape import CallShape

_MOST_BRANCHES = 64  # at one call; beyond, the oldest are forgotten, with their programs
_VALUES = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), type, enum.Enum, range)
_FEW_DEAD = 64  # tensors that are gone before the tree is searched for calls on them


class Call:
    """One call on a path of the recording.

    Attributes:
        function: What is called.
        structure: Of `(args, kwargs)`.
        kinds: What is the same at each run of each leaf.
        modes: torch's modes.
        region: The checkpointed block that the call is in.
        where: The script's line.
        numbers: Positions of leaves that are floats which change from run to run.
        shape: What the call returns.
        failure: Why it cannot be recorded, if that was found out.
        optimizers: What is known of the optimizers whose `step` it is.
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
        "function",
        "kinds",
        "last",
        "loop",
        "modes",
        "numbers",
        "optimizers",
        "pieces",
        "programs",
        "region",
        "shape",
        "structure",
        "where",
        "wrong_guesses",
    )

    def __init__(self, function: Any, structure: TreeDef | None, kinds: tuple, modes: Any, parent: "Call | None"):
        self.function = function
        self.structure = structure
        self.kinds = kinds
        self.modes = modes
        self.region = 0
        self.where: str | None = None
        self.numbers: tuple[int, ...] = ()
        self.shape: CallShape | None = None
        self.failure: CaptureError | None = None
        self.optimizers: tuple = ()
        self.pieces: tuple[tuple[int, bytes | int], ...] | None = None
        self.programs: dict[Any, list] = {}
        self.children: dict[tuple, Call] = {}
        self.backward_follows: bool | None = None
        self.wrong_guesses = 0
        self.last: Call | None = None
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.loop = 0 if parent is None else loop_of(parent, function)


class Recording:
    """The tree, and the tensors that its calls know by identity.

    Attributes:
        root: Where every tape begins.
        shapes: What calls return, by what that depends on.
    """

    def __init__(self):
        self.root = Call(None, None, (), None, None)
        self.shapes: dict[tuple, CallShape] = {}
        self._tensors: dict[int, tuple] = {}
        self._objects: dict[int, tuple[weakref.ref, tuple]] = {}
        self._floats: dict[int, dict[int, float]] = {}
        self._changing_floats: dict[int, set[int]] = {}
        self._fixed: dict[int, set[int]] = {}
        self._count = 0
        self._dead: set[int] = set()

    def kind_of_state(self, tensor: torch.Tensor) -> tuple:
        """What a key has of a tensor that is known by identity; another one for each tensor there has ever been."""
        known = self._tensors.get(id(tensor))
        shape, stride = tensor.shape, tensor.stride()
        if known is None or known[0]() is not tensor:
            self._count += 1
            number = self._count
            known = (weakref.ref(tensor, lambda _: self._dead.add(number)), shape, stride, tensor.dtype, number)
            known = (*known, *(("state", number, shape, stride, tensor.dtype, grad) for grad in (True, False)))
            self._tensors[id(tensor)] = known
        elif known[1] != shape or known[2] != stride or known[3] is not tensor.dtype:  # `p.data = ...`
            number = known[4]
            known = (known[0], shape, stride, tensor.dtype, number)
            known = (*known, *(("state", number, shape, stride, tensor.dtype, grad) for grad in (True, False)))
            self._tensors[id(tensor)] = known
        return known[5] if tensor.requires_grad else known[6]

    def kind_of_object(self, leaf: Any) -> tuple:
        """What a key has of an object that is neither a tensor nor a plain value."""
        if isinstance(leaf, _VALUES):
            return (type(leaf), leaf)
        known = self._objects.get(id(leaf))
        if known is None or known[0]() is not leaf:
            try:
                self._count += 1
                number = self._count
                known = (weakref.ref(leaf, lambda _: self._dead.add(number)), ("state", number, type(leaf)))
            except TypeError:
                return (type(leaf), leaf)  # cannot be referred to weakly: a plain value of some kind
            self._objects[id(leaf)] = known
        return known[1]

    def follow(
        self,
        parent: Call,
        function: Callable,
        structure: TreeDef,
        kinds: tuple,
        leaves: list[Any],
        modes: TorchModes,
        region: int,
        extra: tuple,
    ) -> Call:
        """The call that follows `parent`, made if this path is new.

        Args:
            parent: The last call of the tape.
            function: What is called.
            structure: Of `(args, kwargs)`.
            kinds: Of the leaves, see `Call`; a float's is `(float, value)`.
            leaves: What the call is given.
            modes: torch's modes.
            region: The checkpointed block that the call is in.
            extra: What is known of the optimizers whose `step` it is.
        """
        last = parent.last
        if (
            last is not None
            and last.function == function
            and (last.modes is modes or last.modes == modes)
            and last.region == region
            and last.optimizers == extra
            and (last.structure is structure or last.structure == structure)
        ):
            if last.kinds == kinds:
                return last
            if last.numbers:
                kinds_now = _with_numbers(kinds, last.numbers, leaves)
                if kinds_now == last.kinds:
                    return last
        return self._branch(parent, function, structure, kinds, leaves, modes, region, extra)

    def _branch(self, parent, function, structure, kinds, leaves, modes, region, extra) -> Call:
        try:
            hash(kinds)
        except TypeError:
            odd = next(leaf for leaf in leaves if not _is_hashable(leaf))
            raise CaptureError(
                reason=f"a {type(odd).__name__} is passed to {getattr(function, '__name__', function)}",
                where=user_line(),
            ) from None
        key = (function, structure, kinds, modes, region, extra)
        known = parent.children.get(key)
        if known is None:
            numbers = self._changing(parent, function, leaves)
            if numbers:
                kinds = _with_numbers(kinds, numbers, leaves)
                key = (function, structure, kinds, modes, region, extra)
                known = parent.children.get(key)
            if known is None:
                known = Call(function, structure, kinds, modes, parent)
                known.numbers, known.region, known.optimizers = numbers, region, extra
                known.where = user_line()
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
            if any(type(kind) is tuple and kind[0] == "state" and kind[1] in dead for kind in child.kinds):
                del parent.children[key]
                if parent.last is child:
                    parent.last = None
            else:
                pending.append(child)


def _with_numbers(kinds: tuple, numbers: tuple[int, ...], leaves: list[Any]) -> tuple:
    """The kinds of leaves, some of them floats of which only the sign counts: a forward may ask whether one is zero."""
    found = list(kinds)
    for index in numbers:
        value = leaves[index]
        if type(value) is float and value != 0.0:
            found[index] = ("number", value > 0)
    return tuple(found)


def _is_hashable(leaf: Any) -> bool:
    try:
        hash(leaf)
    except TypeError:
        return False
    return True


def kind_of_constant(leaf: Any) -> tuple:
    """What a key has of a leaf that is no tensor."""
    kind = type(leaf)
    if kind is float:
        if leaf != leaf:
            return (float, "nan")
        return (float, leaf) if leaf != 0.0 or math.copysign(1.0, leaf) > 0 else (float, "-0")  # which equals 0
    return (kind, repr(leaf) if kind is complex else leaf)


def numbers_of(call: Call, leaves: list[Any]) -> tuple[int, ...]:
    """The positions whose floats are inputs in this run."""
    return tuple(index for index in call.numbers if type(leaves[index]) is float and leaves[index] != 0.0)
