"""Recurrent layers: one operator for each layer and direction, or ordinary ones, a set for each place."""

import contextlib

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tests.pytorch.operators.harness import FunctionalRecorder, assert_program_matches
from trainingcompiler.frameworks.pytorch.ops import recurrent
from trainingcompiler.frameworks.pytorch.ops.rnn_cells import CELLS

LAYERS = {
    "LSTM": lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True),
    "projected LSTM": lambda: nn.LSTM(3, 4, proj_size=2, batch_first=True),
    "GRU": lambda: nn.GRU(3, 4),
    "RNN": lambda: nn.RNN(3, 4, nonlinearity="relu"),
}


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # what torch 2.13 says whenever oneDNN's flags are set
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name):
    layer, x = LAYERS[name](), torch.randn(3, 3, 3, requires_grad=True)
    with torch.backends.mkldnn.flags(enabled=False):
        assert_program_matches(lambda: layer(x)[0].square().sum().backward())


class Ours(TorchFunctionMode):
    """As in a capture."""

    def __init__(self):
        super().__init__()
        self.taken = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if recurrent.is_taken(function, args):
            self.taken += 1
            return recurrent.run(function, args)
        return function(*args, **(kwargs or {}))


TAKEN = {
    "LSTM": lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True),
    "LSTM, rows first": lambda: nn.LSTM(3, 4, batch_first=True),
    "LSTM without biases": lambda: nn.LSTM(3, 4, num_layers=2, bias=False),
    "GRU": lambda: nn.GRU(3, 4, num_layers=2, bidirectional=True, batch_first=True),
    "GRU without biases": lambda: nn.GRU(3, 4, bias=False),
    "RNN": lambda: nn.RNN(3, 4, num_layers=2, bidirectional=True),
    "RNN with ReLU": lambda: nn.RNN(3, 4, nonlinearity="relu"),
}


def program_of(layer: nn.Module, places: int):
    """Outputs, last states, and the gradients of all that goes in, of a layer on random values."""
    shape = (2, places, 3) if layer.batch_first else (places, 2, 3)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    count = layer.num_layers * (1 + layer.bidirectional)
    states = [torch.randn(count, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def program():
        outputs, last = layer(x, tuple(states) if isinstance(layer, nn.LSTM) else states[0])
        last = last if isinstance(last, tuple) else (last,)
        total = outputs.cos().sum() + sum((index + 2) * state.sin().sum() for index, state in enumerate(last))
        inputs = [x, *states[: len(last)], *layer.parameters()]
        return outputs, *last, *torch.autograd.grad(total, inputs)

    return program


@pytest.mark.parametrize("places", [1, 5])
@pytest.mark.parametrize("name", TAKEN)
def test_one_operator_computes_what_a_layer_does(name, places):
    layer = TAKEN[name]().double()
    program = program_of(layer, places)
    with Ours() as ours:
        found = program()
    assert ours.taken == 1
    for one, other in zip(found, program(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)  # float64, in another order

    def captured():
        with Ours():
            program()

    assert_program_matches(captured)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("reverse", [False, True])
def test_the_operator_is_a_good_citizen_of_torch(name, reverse):
    rows, size, gates = 2, 3, CELLS[name].gates * 3
    shapes = (4, rows, 2), (rows, size), (rows, size if name == "lstm" else 0), (gates, 2), (gates, size), gates, gates
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    operator = torch.ops.trainingcompiler.recurrent_layer.default
    torch.library.opcheck(operator, (name, *tensors, reverse), test_utils=checks)


def test_an_infinite_gradient_stays_behind_what_relu_has_cut():
    layer = nn.RNN(3, 4, nonlinearity="relu")
    nn.init.constant_(layer.bias_ih_l0, -100.0)
    x = torch.randn(5, 2, 3, requires_grad=True)
    with Ours():
        gradient = torch.autograd.grad(layer(x)[0], x, torch.full((5, 2, 4), torch.inf))[0]
    assert torch.equal(gradient, torch.zeros_like(x))


@pytest.mark.parametrize(("x", "error"), [(torch.randn(0, 2, 3), "length"), (torch.randn(5, 2, 3), "dtype")])
def test_errors_are_torchs(x, error):
    h0 = torch.zeros(1, 2, 4, dtype=torch.float64 if error == "dtype" else torch.float32)
    with Ours() as ours, pytest.raises((RuntimeError, ValueError)):
        nn.GRU(3, 4)(x, h0)
    assert not ours.taken


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("autocast", [False, True])
def test_what_is_left_to_torch(autocast):
    layer = nn.LSTM(3, 4) if autocast else nn.LSTM(3, 4, proj_size=2)
    x = torch.randn(5, 2, 3)
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3]))
    # torch itself refuses an LSTM in bfloat16 on a CPU without AVX-512: whose call it is, is all that is asked.
    for given in (x, packed):
        with Ours() as ours, torch.autocast("cpu", enabled=autocast), contextlib.suppress(RuntimeError):
            layer(given)
        assert not ours.taken


def test_the_operators_do_not_grow_with_the_sequence():
    def operators(places):
        layer, x = nn.LSTM(3, 4, num_layers=2, dropout=0.1), torch.randn(places, 2, 3)
        with FunctionalRecorder() as recorder, Ours():
            layer(x)[0].sum().backward()
        return [call.name for call in recorder.calls]

    assert operators(2) == operators(50)


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cell(cell):
    layer, x = cell(3, 4), torch.randn(2, 3, requires_grad=True)

    def program():
        state = layer(x)
        (state[0] if isinstance(state, tuple) else state).square().sum().backward()

    assert_program_matches(program)
