"""History is kept: what torch has computed from parameters keeps its path for the gradient."""

import pytest
from rule import holds

PENALTIES = {
    "before the call": "penalty = {}\n    loss = F.cross_entropy(model(x), y) + 1e-2 * penalty",
    "after the call": "loss = F.cross_entropy(model(x), y)\n    penalty = {}\n    loss = loss + 1e-2 * penalty",
}


@pytest.mark.parametrize("place", PENALTIES.values(), ids=PENALTIES)
@pytest.mark.parametrize("norm", ["p.pow(2).sum()", "p.abs().sum()"], ids=["l2", "l1"])
def test_a_regularizer_of_plain_parameters(place, norm, tmp_path):
    body = place.format(f"sum({norm} for p in model.parameters())")
    ran = holds(
        f"""
model = mlp()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for x, y in DATA:
    optimizer.zero_grad()
    {body}
    loss.backward()
    optimizer.step()
    print(loss.item())
report(model)
""",
        tmp_path,
    )
    assert ran.compiles == 1


def test_a_leaf_of_the_loops_own_gets_its_gradient(tmp_path):
    holds(
        """
        model, scale = mlp(), torch.ones(4, requires_grad=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x, y in DATA:
            optimizer.zero_grad()
            F.cross_entropy(model(x) * scale, y).backward()
            optimizer.step()
            with torch.no_grad():
                scale -= 0.1 * scale.grad
            scale.grad = None
            print(*scale.tolist())
        report(model)
        """,
        tmp_path,
    )
