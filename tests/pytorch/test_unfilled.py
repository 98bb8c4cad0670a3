"""Weights that nobody needs take no memory: a plan's script runs without filling them."""

import subprocess
import sys

import torch
from torch import nn

from trainingcompiler.frameworks.pytorch.aot.skip_init import SkipParameterInit

LARGE = """
import resource
import torch
from torch import nn
from trainingcompiler.frameworks.pytorch.aot.skip_init import SkipParameterInit

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with SkipParameterInit():
    model = nn.Sequential(*[nn.Linear(16384, 16384) for _ in range(4)])
    for layer in model:
        nn.init.normal_(layer.weight, std=0.02)
        layer.weight.data  # a look is no write
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_four_gigabytes_of_weights_take_none():
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 4 * 4 * 16384**2 / 20


def test_what_is_small_or_no_parameter_is_written():
    large, small, plain = nn.Parameter(torch.zeros(512, 512)), nn.Parameter(torch.zeros(8)), torch.zeros(512, 512)
    with SkipParameterInit(), torch.no_grad():
        assert large.normal_() is large and nn.init.ones_(large) is large and large.copy_(plain + 1) is large
        nn.init.ones_(small)
        plain.fill_(2)
        assert not large.requires_grad_(False).requires_grad
    assert large.eq(0).all() and small.eq(1).all() and plain.eq(2).all()
    with torch.no_grad():
        assert nn.init.ones_(large).eq(1).all()
