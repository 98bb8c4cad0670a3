"""Runs one compiled step of a model, and prints what it was planned to add to the process's memory and what it did."""

import json
import os
import sys
from pathlib import Path

import jax
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from trainingcompiler.compiling import compiler
from trainingcompiler.frameworks.pytorch.aot.step_program import step_program


class Transformer(nn.Module):
    """Two causal layers."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(1000, 256)
        layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(256, 1000)

    def forward(self, ids):
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.head(self.layers(self.embed(ids), mask=mask, is_causal=True))


class Recurrent(nn.Module):
    """A GRU over 32 places."""

    def __init__(self):
        super().__init__()
        self.cells, self.head = nn.GRU(64, 512, batch_first=True), nn.Linear(512, 10)

    def forward(self, x):
        return self.head(self.cells(x)[0])


def conv(*channels: int) -> nn.Sequential:
    """Convolutions of 3 x 3, normalized."""
    layers: list[nn.Module] = []
    for inside, outside in zip(channels, channels[1:], strict=False):
        layers += [nn.Conv2d(inside, outside, 3, padding=1), nn.BatchNorm2d(outside), nn.ReLU()]
    return nn.Sequential(*layers)


def mlp() -> nn.Sequential:
    """Four wide layers."""
    return nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(1024, 1024), nn.Tanh())])


def mean_square(model, x):
    return model(x).square().mean()


def next_token(model, ids):
    return F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())


MODELS = {
    "mlp": (mlp, lambda: torch.randn(16384, 1024), mean_square),
    "cnn": (lambda: conv(3, 64, 64, 64, 64, 64), lambda: torch.randn(32, 3, 64, 64), mean_square),
    "transformer": (Transformer, lambda: torch.zeros(32, 256, dtype=torch.int64), next_token),
    "recurrent": (Recurrent, lambda: torch.randn(512, 32, 64), mean_square),
    "embedding": (
        lambda: nn.Sequential(nn.EmbeddingBag(10000, 512), nn.Linear(512, 8192)),
        lambda: torch.zeros(8192, 16, dtype=torch.int64),
        mean_square,
    ),
}


def resident_bytes(what: str) -> int:
    """`"VmRSS"`, what the process has now, or `"VmHWM"`, the most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def forget_peak() -> None:
    """Sets the kernel's peak to what the process has now."""
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    """Prints `planned` and `grown`, in bytes."""
    # One thread: two products that are packed at the same time, as happens on a busy machine, take 40 MB more.
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    make, batch, loss = MODELS[sys.argv[1]]
    torch.manual_seed(0)
    model = make()
    program = step_program(model, torch.optim.SGD(model.parameters(), lr=0.1), loss, batch())
    executable = compiler.compile(program, checks_memory=False)
    with jax.enable_x64(True):
        state, inputs = (
            tuple(jax.device_put(np.ones(spec.shape, spec.dtype)) for spec in specs)
            for specs in (program.state, program.inputs)
        )
        jax.block_until_ready((state, inputs))
        forget_peak()
        before = resident_bytes("VmRSS")
        jax.block_until_ready(executable(state, inputs))
        grown = resident_bytes("VmHWM") - before
    print(json.dumps({"planned": executable.memory.added_bytes, "grown": grown}))


if __name__ == "__main__":
    main()
