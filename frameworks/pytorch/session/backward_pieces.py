"""The pieces of Python that backward runs, and the functions that put them into a graph.

`backward_python` says when they run.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from trainingcompiler.errors import CaptureError
from trainingcompiler.frameworks.pytorch.interop.source_lines import user_line

Gradients = Sequence[torch.Tensor | None]


class NotRecordable(Exception):
    """A function does what cannot be recorded: it is torch's to run."""


class LeftToTorch(BaseException):
    """Ends what is being recorded of a backward, as Python in it asks for what only torch can give.

    No `Exception`: the script's Python, which it passes, may catch those.

    Attributes:
        error: What it has asked for, and at which line.
    """

    def __init__(self, reason: str):
        super().__init__(reason)
        self.error = CaptureError(reason, user_line())


class Piece:
    """Python that backward calls, at one place of the graph.

    Attributes:
        name: What a person calls it.
    """

    def __init__(self, name: str):
        self.name = name

    def backward(self, gradients: Gradients) -> Any:
        """Runs the script's Python.

        Args:
            gradients: Of the tensors that `attached` or `hooked` has returned; None where there is none.

        Returns:
            What the Python returns: for a function, gradients of its arguments; for a hook, a new gradient or None.
        """
        raise NotImplementedError

    def returned(self, values: list[Any]) -> Any:
        """What autograd is to get for the values of an `outgoing` entry."""
        raise NotImplementedError


class Hook(Piece):
    """A hook that the script has registered on a result.

    Attributes:
        function: The hook.
        is_removed: Whether the script has removed it.
    """

    def __init__(self, function: Callable):
        super().__init__(f"a hook, {getattr(function, '__name__', type(function).__name__)},")
        self.function = function
        self.is_removed = False

    def backward(self, gradients: Gradients) -> Any:
        """Calls the hook."""
        return None if self.is_removed else _checked(self.function, self.function(gradients[0]), gradients[0])

    def returned(self, values: list[Any]) -> Any:
        """The gradient that the hook has put in the place of its own, or None."""
        return values[0] if values else None


def _checked(function: Callable, found: Any, gradient: Any) -> Any:
    """What a hook has returned.

    Raises:
        RuntimeError: As torch's: it has another shape than the gradient.
    """
    if isinstance(found, torch.Tensor) and found.shape != gradient.shape:
        name = getattr(function, "__name__", type(function).__name__)
        raise RuntimeError(f"hook '{name}' has changed the size of value")
    return found


class LeafHooks(Piece):
    """The hooks that the script has registered on a parameter, as they are at a backward.

    Args:
        functions: Likewise, in their order.
    """

    def __init__(self, functions: list[Callable]):
        name = getattr(functions[0], "__name__", type(functions[0]).__name__)
        super().__init__(f"a hook of a parameter, {name},")
        self._functions = functions

    def backward(self, gradients: Gradients) -> Any:
        """Calls the hooks, each with what the one before it has put in the gradient's place."""
        gradient, is_another = gradients[0], False
        for function in self._functions:
            found = _checked(function, function(gradient), gradient)
            if found is not None:
                gradient, is_another = found, True
        return gradient if is_another else None

    def returned(self, values: list[Any]) -> Any:
        """The gradient that the hooks have put in the place of torch's, or None."""
        return values[0] if values else None


class Handle:
    """What `register_hook` returns for a result of the tape.

    Args:
        hook: Likewise.
        removed: Is called when the script removes it.
    """

    def __init__(self, hook: Hook, removed: Callable[[], None]):
        self._hook, self._removed = hook, removed
        self.id = id(hook)

    def remove(self) -> None:
        """Has the hook not run any more."""
        if not self._hook.is_removed:
            self._removed()
            self._hook.is_removed = True

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class Context:
    """What a function is given as `ctx`, in place of torch's.

    Attributes:
        needs_input_grad: For each argument, whether it needs a gradient.
        saved_tensors: What `save_for_backward` was given.
        silent: The results that have no gradient, by identity.
        materializes: Whether a gradient that is not there is given as zeros.
    """

    def __init__(self, needs_input_grad: tuple[bool, ...]):
        self.needs_input_grad = needs_input_grad
        self.saved_tensors: tuple = ()
        self.silent: set[int] = set()
        self.materializes = True

    def save_for_backward(self, *tensors: Any) -> None:
        """See `torch.autograd.function.FunctionCtx`, here and below."""
        self.saved_tensors = tensors

    def save_for_forward(self, *tensors: Any) -> None:
        """Is for forward-mode gradients, which nothing here computes."""

    def mark_non_differentiable(self, *tensors: Any) -> None:
        """These results have no gradient."""
        self.silent = set(map(id, tensors))

    def set_materialize_grads(self, value: bool) -> None:
        """Whether a gradient that is not there is given as zeros, or as None."""
        self.materializes = value

    def mark_dirty(self, *_: Any) -> None:
        """Is not known: a function that writes to its arguments is torch's.

        Raises:
            NotRecordable: Always.
        """
        raise NotRecordable("writes to its arguments")


class Function(Piece):
    """An `autograd.Function` that was applied.

    Args:
        kind: The class.
        context: What its forward was given.
        positions: Those of the arguments that are tensors.
        results: Which of the results of its forward are tensors.
    """

    def __init__(self, kind: Any, context: Context, positions: list[int], results: list[bool]):
        super().__init__(f"backward() of {kind.__name__}")
        self._kind, self._context, self._positions, self._results = kind, context, positions, results

    def backward(self, gradients: Gradients) -> list[Any]:
        """Calls the class's own `backward`; returns the gradients of the arguments that are tensors."""
        given = iter(gradients)
        found = self._kind.backward(self._context, *[next(given) if known else None for known in self._results])
        found = found if isinstance(found, tuple) else (found,)
        return [found[position] if position < len(found) else None for position in self._positions]

    def returned(self, values: list[Any]) -> Any:
        """The gradients of the arguments that are tensors."""
        return values or None


def attached(
    piece: Any, inputs: Sequence[torch.Tensor], results: Sequence[torch.Tensor], silent: bytes, materializes: bool
) -> tuple[torch.Tensor, ...]:
    """The results of an applied function, with a gradient history, as an entry of the tape.

    Args:
        piece: Whose `backward` computes gradients; None where only shapes are asked for.
        inputs: The function's arguments that are tensors.
        results: What its forward has computed of them.
        silent: Positions of the results that have no gradient.
        materializes: Whether a gradient that is not there is given as zeros.

    Returns:
        Tensors like `results`.
    """
    # Views: whoever swaps real tensors for fake ones sees torch functions only.
    given = [tensor.view_as(tensor) for tensor in (*inputs, *results)]
    return _Attached.apply(piece, silent, materializes, len(inputs), *given)


def hooked(piece: Any, result: torch.Tensor) -> None:
    """Registers a hook, as an entry of the tape."""
    if piece is None:
        return

    def hook(gradient: torch.Tensor) -> torch.Tensor | None:
        found = piece.backward((gradient,))
        return None if found is NotImplemented else found

    result.register_hook(hook)


def removed(piece: Any, result: torch.Tensor) -> None:
    """A hook is removed, as an entry of the tape: another path, on which the hook does nothing."""


def leaf_hooked(piece: Any, leaf: torch.Tensor) -> None:
    """Registers a piece on a parameter before a backward, as an entry of the tape, in the place of the hooks it has."""
    if piece is not None:
        piece.suspend(leaf)
        hooked(piece, leaf)


def leaf_unhooked(piece: Any, leaf: torch.Tensor) -> None:
    """The backward is over, as an entry of the tape: the parameter has its own hooks again."""
    if piece is not None:
        piece.resume()


for function in (attached, hooked, removed, leaf_hooked, leaf_unhooked):
    vars(function)["takes_piece"] = True


def incoming(results: Sequence[torch.Tensor], positions: bytes) -> list[torch.Tensor]:
    """The gradients that a piece is given, as an entry of the tape.

    Args:
        results: What they are the gradients of.
        positions: Of which of the piece's results those are the gradients.

    Returns:
        Tensors of their shapes; who runs the tape has autograd's in their place.
    """
    return [torch.empty_like(result) for result in results]


def outgoing(gradients: Any) -> Any:
    """The gradients that a piece returns, as an entry of the tape."""
    return gradients


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx, piece, silent, materializes, count, *tensors):
        ctx.piece, ctx.shapes = piece, [(tensor.shape, tensor.dtype) for tensor in tensors]
        ctx.count = count
        ctx.set_materialize_grads(materializes)
        memory = {tensor.untyped_storage()._cdata for tensor in tensors[:count]}
        results = tuple(
            result.detach() if result.untyped_storage()._cdata in memory else result.clone()
            for result in tensors[count:]
        )
        ctx.mark_non_differentiable(*[results[position] for position in silent])
        return results

    @staticmethod
    def backward(ctx, *gradients):
        found = ctx.piece.backward(gradients)
        if found is None:
            found = [None] * ctx.count
        elif found is NotImplemented:
            found = [torch.zeros(shape, dtype=dtype) for shape, dtype in ctx.shapes[: ctx.count]]
        return (None,) * 4 + (*found,) + (None,) * (len(ctx.shapes) - ctx.count)
