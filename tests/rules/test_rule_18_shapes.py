"""Shapes that depend on values: what needs no gradient runs in torch on values, the rest of the step is compiled."""

import pytest
from rule import holds

LOSSES = {
    "a mask": "F.cross_entropy(out[x[:, 0] > 0], y[x[:, 0] > 0])",
    "masked_select": "out.masked_select(x[:, :4] > 0).pow(2).mean()",
    "a mask of itself": "out[out > 0].pow(2).sum()",
}
EXACT = {
    "where": "torch.where((x[:, 0] > 0)[:, None], out, 0.0).pow(2).mean()",
    "ignore_index": "F.cross_entropy(out, torch.where(x[:, 0] > 0, y, -100))",
    "a weighted mean": "(F.cross_entropy(out, y, reduction='none') * (x[:, 0] > 0)).sum() / (x[:, 0] > 0).sum()",
}
LOOP = """
model = mlp()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for x, y in DATA:
    optimizer.zero_grad()
    out = model(x)
    loss = {}
    loss.backward()
    optimizer.step()
    print(loss.item())
report(model)
"""


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_loss_of_selected_rows_runs_in_torch(loss, tmp_path):
    """As a whole: torch's autograd has to reach the parameters, whatever the loop asks of it."""
    holds(LOOP.format(loss), tmp_path, says="the shape of a result depends on values (aten.", line="loss = ")


def test_rows_selected_by_numbers_are_compiled_for_every_count(tmp_path):
    """`nonzero` itself needs no gradient, and is made on values."""
    rows = "rows = out.sum(1).gt(0.5).nonzero().squeeze(1)[:3]; "
    ran = holds(LOOP.format("out[rows].pow(2).sum()").replace("loss =", rows + "loss ="), tmp_path, notes=1)
    (said,) = (line for line in ran.said if line.startswith("[note]"))
    assert "torch runs one call of the step" in said and "the shape of a result depends on values (aten.nonzero" in said


@pytest.mark.parametrize("loss", EXACT.values(), ids=EXACT)
def test_the_same_with_a_fixed_shape_is_compiled(loss, tmp_path):
    assert holds(LOOP.format(loss), tmp_path).compiles == 1


def test_a_metric_of_selected_rows_leaves_the_step_compiled(tmp_path):
    ran = holds(
        """
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x, y in DATA:
            optimizer.zero_grad()
            out = model(x)
            loss = F.cross_entropy(out, y)
            right = (out.argmax(1) == y)[x[:, 0] > 0].double().mean()
            with torch.no_grad():
                largest = out[y == 1].max()
            loss.backward()
            optimizer.step()
            print(loss.item(), right.item(), largest.item(), out.detach().masked_select(out > 0).sum().item())
        report(model)
        """,
        tmp_path,
        notes=2,
    )
    said = [line for line in ran.said if "torch runs one call of the step" in line]
    assert len(said) == 2 and all("the shape of a result depends on values" in line for line in said)
