"""Optimizers: torch's own, and those whose Python runs at every step and is recorded."""

import pytest
from rule import holds

COUNTS = {
    "in its state": ('self.state[p]["step"] = self.state[p].get("step", 0) + 1', 'self.state[p]["step"]'),
    "in the group": ('group["t"] = group.get("t", 0) + (p is group["params"][0])', 'group["t"]'),
    "in itself": ('self.t = getattr(self, "t", 0) + (p is group["params"][0])', "self.t"),
}


@pytest.mark.parametrize(("count", "t"), COUNTS.values(), ids=COUNTS)
def test_a_third_party_adam(count, t, tmp_path):
    holds(
        f"""
class Adam(torch.optim.Optimizer):
    def __init__(self, parameters, lr):
        super().__init__(parameters, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                {count}
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                v = self.state[p].setdefault("v", torch.zeros_like(p))
                m.mul_(0.9).add_(p.grad, alpha=0.1)
                v.mul_(0.99).addcmul_(p.grad, p.grad, value=0.01)
                t = {t}
                p.addcdiv_(m / (1 - 0.9**t), (v / (1 - 0.99**t)).sqrt() + 1e-8, value=-group["lr"])

model = mlp()
optimizer = Adam(model.parameters(), lr=1e-2)
for x, y in DATA:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    print(loss.item())
report(model)
""",
        tmp_path,
    )


OPTIMIZERS = {
    "replaces its state": """
                d, state = p.grad.data, self.state[p]
                state["b"] = d.clone() if "b" not in state else state["b"] * 0.9 + d
                p.data.add_(state["b"], alpha=-group["lr"])""",
    "draws": """
                p.add_(p.grad, alpha=-group["lr"] * random.random())""",
    "does something else every third time": """
                self.t = getattr(self, "t", 0) + 1
                p.sub_(p.grad.sign() if self.t % 3 == 0 else p.grad, alpha=group["lr"])""",
    "changes gradients": """
                p.grad.mul_(0.5)
                p.grad.add_(p, alpha=0.1)
                p -= group["lr"] * p.grad""",
    "keeps a list": """
                self.seen = getattr(self, "seen", [])[-6:] + [p.grad.norm()]
                p.sub_(p.grad / torch.stack(self.seen).max(), alpha=group["lr"])""",
    "asks whether a weight is large": """
                p.sub_(p.grad, alpha=group["lr"] * (0.5 if p.norm() > 1 else 1))""",
}


CALLS = {
    "plain": "loss = backward(); optimizer.step(); print(loss.item())",
    "with a closure": "print(optimizer.step(backward).item())",
    "after a look": "print(backward().item()); optimizer.step()",
}


@pytest.mark.parametrize(
    ("update", "call"),
    [
        *((update, CALLS["plain"]) for update in OPTIMIZERS.values()),
        *((OPTIMIZERS["draws"], c) for c in CALLS.values()),
    ],
    ids=[*OPTIMIZERS, *CALLS],
)
def test_a_step_of_ones_own(update, call, tmp_path):
    holds(
        f"""
import random
random.seed(0)

class Own(torch.optim.Optimizer):
    def __init__(self, parameters, lr):
        super().__init__(parameters, dict(lr=lr))

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue{update}
        return loss

model = mlp()
optimizer = Own(model.parameters(), lr=1e-2)
for x, y in DATA:
    def backward():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss
    {call}
report(model)
""",
        tmp_path,
    )


DOUBTFUL = {
    "asks for a gradient's value": """
                if p.grad.norm() > 0.1:
                    p.sub_(p.grad, alpha=group["lr"])""",
    "puts another tensor into a parameter": """
                p.data = p.data - group["lr"] * p.grad""",
}


@pytest.mark.parametrize("update", DOUBTFUL.values(), ids=DOUBTFUL)
def test_a_step_that_is_left_to_torch(update, tmp_path):
    ran = holds(
        f"""
class Own(torch.optim.Optimizer):
    def __init__(self, parameters, lr):
        super().__init__(parameters, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:{update}

model = mlp()
optimizer = Own(model.parameters(), lr=1e-2)
for x, y in DATA:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    print(loss.item())
report(model)
""",
        tmp_path,
        says="step() of Own asks for values that depend on gradients, so the step itself runs in torch",
        line="optimizer.step()",
    )
    assert ran.compiles  # forward and backward


def test_one_cycle_changes_the_momentum(tmp_path):
    ran = holds(
        """
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=len(DATA))
        for x, y in DATA:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
            print(optimizer.param_groups[0]["momentum"])
        report(model)
        """,
        tmp_path,
    )
    assert ran.compiles <= 2


def test_a_step_hook_runs(tmp_path):
    holds(
        """
        model, calls = mlp(), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer.register_step_post_hook(lambda *_: calls.append(model[0].weight.sum().item()))
        for x, y in DATA:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        print(*calls)
        report(model)
        """,
        tmp_path,
        says="SGD has a step hook",
        line="optimizer.step()",
    )
