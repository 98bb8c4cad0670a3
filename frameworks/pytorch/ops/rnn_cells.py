"""The cells of `nn.LSTM`, `nn.GRU` and `nn.RNN`, and their gradients, for arrays of torch and of JAX alike.

The formulas are those of torch's documentation; gates are in its order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Array = Any


class Library(Protocol):
    """What a cell asks of the library that its arrays are of."""

    def sigmoid(self, x: Array) -> Array:
        """Of each element."""

    def tanh(self, x: Array) -> Array:
        """Of each element."""

    def relu(self, x: Array) -> Array:
        """Of each element."""

    def where(self, condition: Array, x: Array | float, y: Array | float) -> Array:
        """Of each element, `x` where the condition holds."""

    def split(self, x: Array, parts: int) -> Sequence[Array]:
        """Cuts the last dim into equal parts."""

    def join(self, parts: Sequence[Array]) -> Array:
        """The parts, side by side in the last dim."""


@dataclass(frozen=True)
class RnnCell:
    """One kind of recurrence.

    Attributes:
        gates: How many times the hidden size `W_ih` and `W_hh` have rows.
        saved: How many times the hidden size the backward needs of each step, besides the outputs.
        forward: `(library, gates of x, gates of h, h, c) -> (h, c, saved)`, arrays of `[batch, ...]`; `c` is empty but
            for an LSTM.
        backward: `(library, dh, dc, saved, output, h) -> (d gates of x, d gates of h, dh, dc)`, where the last two are
            what passes the step by other ways than through the gates, 0 where nothing does.
    """

    gates: int
    saved: int
    forward: Callable[..., tuple[Array, Array, Array]]
    backward: Callable[..., tuple[Array, Array, Array, Array]]


def _lstm(library: Library, x: Array, hidden: Array, h: Array, c: Array) -> tuple[Array, Array, Array]:
    i, f, g, o = library.split(x + hidden, 4)
    i, f, g, o = library.sigmoid(i), library.sigmoid(f), library.tanh(g), library.sigmoid(o)
    new = f * c + i * g
    return o * library.tanh(new), new, library.join([i, f, g, o, c])


def _lstm_backward(
    library: Library, dh: Array, dc: Array, saved: Array, output: Array, h: Array
) -> tuple[Array, Array, Array, Array]:
    i, f, g, o, c = library.split(saved, 5)
    squashed = library.tanh(f * c + i * g)
    dc = dc + dh * o * (1 - squashed * squashed)
    gates = library.join(
        [dc * g * i * (1 - i), dc * c * f * (1 - f), dc * i * (1 - g * g), dh * squashed * o * (1 - o)]
    )
    return gates, gates, 0, dc * f


def _gru(library: Library, x: Array, hidden: Array, h: Array, c: Array) -> tuple[Array, Array, Array]:
    (xr, xz, xn), (hr, hz, hn) = library.split(x, 3), library.split(hidden, 3)
    r, z = library.sigmoid(xr + hr), library.sigmoid(xz + hz)
    n = library.tanh(xn + r * hn)
    return (1 - z) * n + z * h, c, library.join([r, z, n, hn])


def _gru_backward(
    library: Library, dh: Array, dc: Array, saved: Array, output: Array, h: Array
) -> tuple[Array, Array, Array, Array]:
    r, z, n, hn = library.split(saved, 4)
    dn = dh * (1 - z) * (1 - n * n)
    dz = dh * (h - n) * z * (1 - z)
    dr = dn * hn * r * (1 - r)
    return library.join([dr, dz, dn]), library.join([dr, dz, dn * r]), dh * z, dc


def _tanh(library: Library, x: Array, hidden: Array, h: Array, c: Array) -> tuple[Array, Array, Array]:
    return library.tanh(x + hidden), c, c


def _tanh_backward(
    library: Library, dh: Array, dc: Array, saved: Array, output: Array, h: Array
) -> tuple[Array, Array, Array, Array]:
    gates = dh * (1 - output * output)
    return gates, gates, 0, dc


def _relu(library: Library, x: Array, hidden: Array, h: Array, c: Array) -> tuple[Array, Array, Array]:
    return library.relu(x + hidden), c, c


def _relu_backward(
    library: Library, dh: Array, dc: Array, saved: Array, output: Array, h: Array
) -> tuple[Array, Array, Array, Array]:
    gates = library.where(output <= 0, 0, dh)  # no product, which an infinite gradient would make no number
    return gates, gates, 0, dc


CELLS = {
    "lstm": RnnCell(4, 5, _lstm, _lstm_backward),
    "gru": RnnCell(3, 4, _gru, _gru_backward),
    "rnn_tanh": RnnCell(1, 0, _tanh, _tanh_backward),
    "rnn_relu": RnnCell(1, 0, _relu, _relu_backward),
}
"""By the names of torch's functions."""
