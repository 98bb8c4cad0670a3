"""Calls of parts are calls on one tape, wrappers are looked through, and the order of imports does not matter."""

from rule import holds, run


def test_parts_called_one_after_the_other(tmp_path):
    ran = holds(
        """
        encoder = nn.Sequential(nn.Linear(8, 16), nn.Tanh())
        heads = nn.ModuleDict({"a": nn.Linear(16, 4), "b": nn.Linear(16, 4)})
        optimizer = torch.optim.SGD([*encoder.parameters(), *heads.parameters()], lr=0.1)
        for x, y in DATA:
            optimizer.zero_grad()
            hidden = encoder(x)
            loss = F.cross_entropy(heads["a"](hidden), y) + F.cross_entropy(heads["b"](hidden), 3 - y)
            loss.backward()
            optimizer.step()
            print(loss.item())
        report(encoder, heads)
        """,
        tmp_path,
    )
    assert ran.compiles == 1


def test_enabled_before_torch_is_imported(tmp_path):
    script = """
import trainingcompiler as tc
tc.enable(tc.TrainingCompilerConfig(engine="xla"))
import torch
from torch import nn
model = nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(24):
    optimizer.zero_grad()
    model(torch.ones(4, 8)).pow(2).mean().backward()
    optimizer.step()
"""
    path = tmp_path / "early.py"
    path.write_text(script)
    ran = run(f"import runpy; runpy.run_path({str(path)!r}); print('done')", tmp_path, "--engine=xla")
    assert ran.compiled_steps == 24 and ran.out == ["done"]
