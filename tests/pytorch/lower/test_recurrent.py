"""Recurrent layers, which dispatch as ordinary operators, one set for each time step."""

import pytest
import torch
from torch import nn

from tests.pytorch.lower.harness import assert_program_matches

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


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cell(cell):
    layer, x = cell(3, 4), torch.randn(2, 3, requires_grad=True)

    def program():
        state = layer(x)
        (state[0] if isinstance(state, tuple) else state).square().sum().backward()

    assert_program_matches(program)
