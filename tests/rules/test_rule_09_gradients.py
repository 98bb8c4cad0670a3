"""Gradients are watched themselves, not a list of functions that touch them."""

import pytest
from rule import holds

CLIPS = {
    "torch's, imported by name": (
        "from torch.nn.utils import clip_grad_norm_",
        "print(clip_grad_norm_(model.parameters(), 0.1).item())",
    ),
    "somebody else's": (
        """
def clip(parameters, limit):
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    for g in gradients:
        g.mul_(min(1.0, limit / (norm.item() + 1e-6)))
    return norm
""",
        "print(clip(model.parameters(), 0.1).item())",
    ),
    "through data": (
        "",
        "for p in model.parameters():\n        p.grad.data.clamp_(-0.01, 0.01)",
    ),
}


@pytest.mark.parametrize(("helper", "clip"), CLIPS.values(), ids=CLIPS)
def test_clipping(helper, clip, tmp_path):
    holds(
        f"""
{helper}
model = mlp()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for x, y in DATA:
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    {clip}
    optimizer.step()
report(model)
""",
        tmp_path,
    )


def test_a_hook_on_a_parameter_runs(tmp_path):
    holds(
        """
        model, norms = mlp(), []
        model[0].weight.register_hook(lambda gradient: gradient * 0.5)
        model[2].weight.register_hook(lambda gradient: norms.append(gradient.norm().item()))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x, y in DATA:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        print(*norms)
        report(model)
        """,
        tmp_path,
        says="Python that backward() runs asks for a value",
        line="norms.append",
    )


def test_a_hook_on_a_result_runs(tmp_path):
    holds(
        """
        model, norms = mlp(), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x, y in DATA:
            optimizer.zero_grad()
            out = model(x)
            out.register_hook(lambda gradient: norms.append(gradient.norm().item()))
            F.cross_entropy(out, y).backward()
            optimizer.step()
        print(*norms)
        report(model)
        """,
        tmp_path,
        says="Python that backward() runs asks for a value",
        line="out.register_hook",
    )


def test_a_hook_after_a_gradient_has_been_accumulated_runs(tmp_path):
    """The optimizer in backward: torch's own recipe for less memory."""
    holds(
        """
        model = mlp()
        optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

        def update(parameter):
            optimizers[parameter].step()
            optimizers[parameter].zero_grad()

        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(update)
        for x, y in DATA:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            print(loss.item())
        report(model)
        """,
        tmp_path,
        says="a parameter has a gradient hook",
        line="F.cross_entropy(model(x), y)",
    )
