"""A second start finds the step's executable by its captured graph."""

import os
import subprocess
import sys

import pytest
import torch

from trainingcompiler.frameworks.pytorch.graph.ir import Graph, Node, Ref
from trainingcompiler.frameworks.pytorch.lowering.cache_key import graph_cache_key

SCRIPT = """
import sys
import torch
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 4, bias=len(sys.argv) < 2))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
x, y = torch.randn(16, 8), torch.randint(0, 4, (16,))
for step in range(5):
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    print(loss.item())
"""


def graph(*args, operator="aten.add.Tensor", constant=None, dtype=torch.float32) -> Graph:
    node = Node(operator=operator, args=args, kwargs={"alpha": 1}, outputs=(2,), metas=(((3,), dtype),))
    return Graph([0, 1], [node], {} if constant is None else {1: torch.tensor(constant)})


def test_equal_graphs_have_equal_digests():
    one, other = graph(Ref(0), Ref(1)), graph(Ref(0), Ref(1))
    other.nodes[0].where = "another.py:7"  # where it stands decides nothing
    assert graph_cache_key(one, [2], [[0], [1]]) == graph_cache_key(other, [2], [[0], [1]]) is not None


@pytest.mark.parametrize(
    "other",
    [
        graph(Ref(1), Ref(0)),
        graph(Ref(0), 1),
        graph(Ref(0), True),
        graph(Ref(0), 1.0),
        graph(Ref(0), "1"),
        graph(Ref(0), [Ref(1)]),
        graph(Ref(0), Ref(1), operator="aten.sub.Tensor"),
        graph(Ref(0), Ref(1), dtype=torch.float64),
        graph(Ref(0), Ref(1), constant=[1.0]),
        graph(Ref(0), Ref(1), constant=[2.0]),
    ],
)
def test_what_differs_has_another_digest(other):
    same = [graph(Ref(0), Ref(1)), *([graph(Ref(0), Ref(1), constant=[3.0])] if other.constants else [])]
    assert graph_cache_key(other, [2], []) not in [graph_cache_key(one, [2], []) for one in same]


def test_roles_and_results_count():
    one = graph(Ref(0), Ref(1))
    digests = {
        graph_cache_key(one, [2], [[0], [1]]),
        graph_cache_key(one, [2], [[1], [0]]),
        graph_cache_key(one, [2, 2], [[0], [1]]),
    }
    assert len(digests) == 3


def test_what_is_not_known_has_none():
    assert graph_cache_key(graph(Ref(0), object()), [2], []) is None


def test_a_second_start_loads(tmp_path):
    """And trains as the first; a model that differs by one bias does not get its program."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)

    def start(*arguments):
        command = [sys.executable, "-m", "trainingcompiler.launch", "--engine=xla", f"--cache-dir={tmp_path / 'cache'}"]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        return subprocess.run(
            [*command, script, *arguments], capture_output=True, text=True, check=True, env=environment
        )

    first, second, other = start(), start(), start("no bias")
    assert first.stdout == second.stdout and first.stdout.count("\n") == 5
    assert "[lower]" in first.stderr and "not in the cache" in first.stderr
    assert "[load]" in second.stderr and "[lower]" not in second.stderr and "[compile]" not in second.stderr
    assert "1 compile (1 from the cache)" in second.stderr
    assert "[lower]" in other.stderr and other.stdout != first.stdout
