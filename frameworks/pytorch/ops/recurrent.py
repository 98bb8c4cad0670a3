"""`nn.LSTM`, `nn.GRU` and `nn.RNN` in a capture: one operator for each layer and direction.

torch takes them apart into some ten for each place in the sequence, and XLA compiles those for minutes.

Left to torch are packed sequences, projections, autocast, whose precision changes within a layer, and what it refuses:
empty sequences and tensors of several dtypes.
"""

from collections.abc import Callable
from typing import Any

import torch

from trainingcompiler.frameworks.pytorch.interop import cuda_autocast
from trainingcompiler.frameworks.pytorch.ops.rnn_cells import CELLS

_OPERATORS = torch.library.Library("trainingcompiler", "FRAGMENT")
_OPERATORS.define(
    "recurrent_layer(str cell, Tensor x, Tensor h0, Tensor c0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, "
    "bool reverse) -> (Tensor outputs, Tensor h, Tensor c, Tensor saved)"
)
_OPERATORS.define(
    "recurrent_layer_backward(str cell, Tensor d_outputs, Tensor dh, Tensor dc, Tensor x, Tensor h0, Tensor w_ih, "
    "Tensor w_hh, Tensor outputs, Tensor saved, bool reverse) "
    "-> (Tensor dx, Tensor dh0, Tensor dc0, Tensor dw_ih, Tensor dw_hh, Tensor db_ih, Tensor db_hh)"
)
_layer = torch.ops.trainingcompiler.recurrent_layer
_layer_backward = torch.ops.trainingcompiler.recurrent_layer_backward


class _Torch:
    sigmoid, tanh = staticmethod(torch.sigmoid), staticmethod(torch.tanh)
    relu, where = staticmethod(torch.relu), staticmethod(torch.where)

    @staticmethod
    def split(x, parts):
        return x.chunk(parts, -1)

    @staticmethod
    def join(parts):
        return torch.cat(parts, -1)


@torch.library.impl(_OPERATORS, "recurrent_layer", "CompositeExplicitAutograd")
def _layer_in_torch(cell, x, h0, c0, w_ih, w_hh, b_ih, b_hh, reverse):
    kind = CELLS[cell]
    gates = torch.nn.functional.linear(x, w_ih, b_ih)
    outputs, saved = list(x), list(x)  # each place is replaced
    h, c = h0, c0
    for place in reversed(range(len(x))) if reverse else range(len(x)):
        hidden = torch.nn.functional.linear(h, w_hh, b_hh)
        h, c, saved[place] = kind.forward(_Torch, gates[place], hidden, h, c)
        outputs[place] = h
    return torch.stack(outputs), h.clone(), c.clone(), torch.stack(saved)


@torch.library.impl(_OPERATORS, "recurrent_layer", "Meta")
def _layer_of_fakes(cell, x, h0, c0, w_ih, w_hh, b_ih, b_hh, reverse):
    places, rows = x.shape[:2]
    size = h0.shape[-1]
    saved = x.new_empty((places, rows, CELLS[cell].saved * size))
    return x.new_empty((places, rows, size)), torch.empty_like(h0), torch.empty_like(c0), saved


@torch.library.impl(_OPERATORS, "recurrent_layer_backward", "CompositeExplicitAutograd")
def _layer_backward_in_torch(cell, d_outputs, dh, dc, x, h0, w_ih, w_hh, outputs, saved, reverse):
    kind = CELLS[cell]
    hs = torch.cat([outputs[1:], h0[None]] if reverse else [h0[None], outputs[:-1]])
    of_xs, of_hs = list(x), list(x)
    for place in range(len(x)) if reverse else reversed(range(len(x))):
        of_xs[place], of_hs[place], dh, dc = kind.backward(
            _Torch, dh + d_outputs[place], dc, saved[place], outputs[place], hs[place]
        )
        dh = dh + of_hs[place] @ w_hh
    of_x, of_h = torch.stack(of_xs), torch.stack(of_hs)
    dw_ih, dw_hh = torch.einsum("tbg,tbi->gi", of_x, x), torch.einsum("tbg,tbh->gh", of_h, hs)
    return of_x @ w_ih, dh.clone(), dc.clone(), dw_ih, dw_hh, of_x.sum((0, 1)), of_h.sum((0, 1))


@torch.library.impl(_OPERATORS, "recurrent_layer_backward", "Meta")
def _layer_backward_of_fakes(cell, d_outputs, dh, dc, x, h0, w_ih, w_hh, outputs, saved, reverse):
    return (*map(torch.empty_like, (x, dh, dc, w_ih, w_hh)), w_ih.new_empty(len(w_ih)), w_hh.new_empty(len(w_hh)))


def _keep(ctx, inputs, output):
    ctx.cell, x, h0, _, w_ih, w_hh, b_ih, _, ctx.reverse = inputs
    outputs, _, _, saved = output
    ctx.has_biases = b_ih is not None
    ctx.save_for_backward(x, h0, w_ih, w_hh, outputs, saved)


def _gradients(ctx, d_outputs, dh, dc, _):
    x, h0, w_ih, w_hh, outputs, saved = ctx.saved_tensors
    *found, db_ih, db_hh = _layer_backward(ctx.cell, d_outputs, dh, dc, x, h0, w_ih, w_hh, outputs, saved, ctx.reverse)
    return None, *found, *((db_ih, db_hh) if ctx.has_biases else (None, None)), None


torch.library.register_autograd("trainingcompiler::recurrent_layer", _gradients, setup_context=_keep, lib=_OPERATORS)

FUNCTIONS: dict[Callable, str] = {getattr(torch, name): name for name in CELLS}
"""torch's functions, as modules call them, and the names of their cells."""


def is_taken(function: Callable, args: tuple) -> bool:
    """Whether a call of torch's is one that `run` does."""
    if function not in FUNCTIONS or len(args) != 9 or cuda_autocast.is_casting():
        return False
    x, states, parameters, has_biases, layers, _, _, bidirectional, _ = args
    if not isinstance(has_biases, bool) or len(parameters) != layers * (1 + bidirectional) * (4 if has_biases else 2):
        return False
    states = [states] if isinstance(states, torch.Tensor) else states
    return x.numel() > 0 and len({tensor.dtype for tensor in (x, *states, *parameters)}) == 1


def run(function: Callable, args: tuple) -> tuple[torch.Tensor, ...]:
    """Does what torch's function does, by an operator for each layer and direction.

    Args:
        function: A key of `FUNCTIONS`.
        args: Input `[places, rows, features]`, or rows first; the first states; parameters; whether there are biases;
            how many layers; dropout; whether training; whether bidirectional; whether rows are first.

    Returns:
        The outputs, in the order of the input's dims, and the last states.
    """
    cell = FUNCTIONS[function]
    x, states, parameters, has_biases, layers, dropout, training, bidirectional, rows_first = args
    h0s, c0s = states if cell == "lstm" else (states, states.new_empty((*states.shape[:2], 0)))
    directions = 1 + bidirectional
    x = x.transpose(0, 1) if rows_first else x
    last: list[Any] = []
    for layer in range(layers):
        outputs = []
        for index in range(layer * directions, (layer + 1) * directions):
            count = 4 if has_biases else 2
            weights = [*parameters[index * count : (index + 1) * count], None, None][:4]
            ys, h, c, _ = _layer(cell, x, h0s[index], c0s[index], *weights, index % directions == 1)
            outputs.append(ys)
            last.append((h, c))
        x = torch.cat(outputs, -1) if bidirectional else outputs[0]
        if dropout and training and layer < layers - 1:
            x = torch.dropout(x, dropout, True)
    x = x.transpose(0, 1) if rows_first else x
    hs, cs = (torch.stack(kind) for kind in zip(*last, strict=True))
    return (x, hs, cs) if cell == "lstm" else (x, hs)
