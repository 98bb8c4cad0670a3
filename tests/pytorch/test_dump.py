"""What can be printed: tapes, graphs, and with `--dump` every stage of a program."""

import subprocess
import sys

import torch
from parity import train
from small import batches, made, mlp, train_on

from trainingcompiler.frameworks.pytorch.graph.ir import Graph, Node, Ref

SCRIPT = """
import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for rows in (3, 3, 5, 5):
    optimizer.zero_grad()
    loss = model(torch.randn(rows, 4)).square().mean()
    loss.backward()
    optimizer.step()
"""
STAGES = ["tape", "graph", "graph-after-live", "graph-after-barrier_order", "cache-key", "stablehlo", "hlo"]


def launched(folder, *options) -> str:
    (folder / "train.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "trainingcompiler.launch", "--engine=xla", *options, "train.py"]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stderr


def test_every_stage_of_every_program_is_written(tmp_path):
    launched(tmp_path, "--dump=stages")
    first, second = sorted((tmp_path / "stages").iterdir())
    assert (first.name, second.name) == ("001-train_step", "002-train_step")
    texts = {path.stem.partition("-")[2]: path.read_text() for path in sorted(first.iterdir())}
    assert list(texts) == STAGES
    tape = texts["tape"].splitlines()
    assert (
        tape[0]
        == "%0 = linear(input float32[3, 4], state float32[8, 4], state float32[8])  # float32[3, 8], train.py:10"
    )
    assert tape[-2].startswith("Tensor.backward(%4, ") and tape[-1] == "SGD.step(SGD)  # train.py:12"
    assert "aten.addmm.default(" in texts["graph"] and "seed=%" in texts["graph"] and "train.py:10" in texts["graph"]
    assert texts["cache-key"].startswith("graph: ") and "\njax: " in texts["cache-key"]
    assert "stablehlo.dot_general" in texts["stablehlo"] and texts["hlo"].startswith("HloModule")
    assert "float32[5, 4]" in (second / "1-tape.txt").read_text()


def test_what_two_keys_differ_in_is_a_line(tmp_path):
    launched(tmp_path, "--dump=stages")
    keys = [(folder / "5-cache-key.txt").read_text().splitlines() for folder in sorted((tmp_path / "stages").iterdir())]
    differing = [a.partition(":")[0] for a, b in zip(*keys, strict=True) if a != b]
    assert differing == ["graph", "inputs"]


def test_a_folder_that_cannot_be_made_ends_no_training(tmp_path):
    (tmp_path / "stages").write_text("a file")
    assert "was not written" in launched(tmp_path, "--dump=stages") and "2 compiles" in launched(tmp_path)


def test_a_node_is_a_line():
    meta = ((2, 3), torch.float32)
    node = Node(
        "aten.dropout.default", (Ref(1), 0.5), {"train": True}, (2, None), (meta, None), (Ref(0), 4), "train.py:7"
    )
    assert str(node) == "%2, _ = aten.dropout.default(%1, 0.5, train=True, seed=%0+4)  # float32[2, 3], train.py:7"
    graph = Graph([0, 1], [node], {3: torch.tensor([1.0, 2.0])})
    assert str(graph).splitlines() == ["inputs %0, %1", "%3 = [1.0, 2.0]", str(node)]


def test_nothing_is_made_text_that_nobody_writes_down(monkeypatch):
    def fail(*_):
        raise AssertionError("somebody has asked for a text")

    monkeypatch.setattr(Graph, "__str__", fail)
    objects = made(mlp, torch.optim.SGD, lr=0.1)
    train(objects, lambda made, data: train_on(made["model"], made["optimizer"], data), batches(3), compiled=True)
