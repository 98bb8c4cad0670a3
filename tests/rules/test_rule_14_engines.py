"""The engine is chosen by timing once, and what was chosen is said with its figures."""

import pytest
from rule import plainly, run, same

LOOP = """
model = mlp()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(4):
    for x, y in DATA:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
print(loss.item())
report(model)
"""


def test_the_choice_is_made_once_and_said(tmp_path):
    ran = run(LOOP, tmp_path, "--engine=auto")
    (choice,) = ran.lines("engine")
    assert " eager, " in choice and " compiled" in choice


FILLS = """
class Filling(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = mlp()

    def forward(self, x, found):
        x = self.layers(x)
        found.{call}
        return x

model = Filling()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for x, y in DATA:
    optimizer.zero_grad()
    first = model.layers[0](x).mean()
    found = {start}
    loss = F.cross_entropy(model(x, found), y) + 0.1 * sum(found{values})
    loss.backward()
    optimizer.step()
    print(loss.item())
report(model)
"""


@pytest.mark.parametrize(
    ("call", "start", "values"),
    [
        ("update(penalty=x.square().mean())", "{}", ".values()"),
        ("append(x.square().mean())", "[]", ""),
        ("append(x.square().mean())", "[first]", ""),
    ],
    ids=["dict", "list", "list with a result"],
)
@pytest.mark.parametrize("engine", ["auto", "xla"])
def test_a_container_that_forward_fills_is_the_scripts(engine, call, start, values, tmp_path):
    script = FILLS.format(call=call, start=start, values=values)
    same(plainly(script, tmp_path).out, run(script, tmp_path, f"--engine={engine}").out)


GAN = """
G, D = nn.Linear(8, 8), mlp()
optimizer_g, optimizer_d = (torch.optim.SGD(m.parameters(), lr=0.01) for m in (G, D))
for x, y in DATA:
    fake = G(torch.randn_like(x))
    optimizer_d.zero_grad()
    loss_d = D(fake.detach()).mean() - D(x).mean()
    loss_d.backward()
    optimizer_d.step()
    {between}
    optimizer_g.zero_grad()
    loss_g = -D(fake).mean()
    loss_g.backward()
    optimizer_g.step()
    print(loss_d.item(), loss_g.item())
report(G, D)
"""
BETWEEN = {
    "clamped": "for p in D.parameters(): p.data.clamp_(-0.1, 0.1)",
    "clamped without gradients": "with torch.no_grad(): [p.clamp_(-0.1, 0.1) for p in D.parameters()]",
    "copied": "import copy; print(copy.deepcopy(D)[0].weight.sum().item())",
}


@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN)
def test_the_engine_changes_where_nothing_is_pending(between, tmp_path):
    """The first optimizer's step changes the engine, and the generator's result still needs a gradient."""
    script = GAN.format(between=between)
    same(plainly(script, tmp_path).out, run(script, tmp_path, "--engine=auto").out)
