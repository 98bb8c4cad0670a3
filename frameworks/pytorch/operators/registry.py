"""The table from ATen overload names to the JAX functions that compute them.

Operators are looked up by name, never by attribute of `torch.ops`, so that an overload missing from the installed
torch breaks nothing.
"""

from collections.abc import Callable

Lowering = Callable[..., object]

LOWERINGS: dict[str, Lowering] = {}
"""`"aten.add.Tensor"` -> function of the overload's own arguments, JAX arrays in place of tensors."""

RANDOM_LOWERINGS: dict[str, Lowering] = {}
"""Like `LOWERINGS`, for operators that draw random numbers; the function takes a `key` keyword (see `random`)."""

VIEW_INVERSES: dict[str, Lowering] = {}
"""`"aten.slice.Tensor"` -> `(parent, child, *args) -> parent` with the viewed elements replaced by `child`."""

FAKES: dict[str, Callable] = {}
"""Overloads whose results torch's fake tensors do not know -> function of fake arguments that makes fake results."""


def lowers(*names: str) -> Callable[[Lowering], Lowering]:
    """Registers the decorated function as the lowering of each overload named, as `str(overload)` prints it."""
    return _registrar(LOWERINGS, names)


def lowers_random(*names: str) -> Callable[[Lowering], Lowering]:
    """Like `lowers`, for an operator that draws random numbers."""
    return _registrar(RANDOM_LOWERINGS, names)


def inverts_view(*names: str) -> Callable[[Lowering], Lowering]:
    """Registers how a write through a view reaches the tensor it is a view of."""
    return _registrar(VIEW_INVERSES, names)


def _registrar(table: dict[str, Lowering], names: tuple[str, ...]) -> Callable[[Lowering], Lowering]:
    def register(function: Lowering) -> Lowering:
        for name in names:
            assert name not in table, f"{name} has two lowerings"
            table[name] = function
        return function

    return register
