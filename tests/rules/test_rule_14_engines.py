"""The engine is chosen by timing once, and what was chosen is said with its figures."""

from rule import run

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
