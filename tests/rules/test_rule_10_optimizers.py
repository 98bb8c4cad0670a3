"""Optimizers that count in Python: forward and backward are compiled, the step is torch's."""

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
        says="Adam counts in Python in its step, so the step itself runs in torch",
        line="optimizer.step()",
    )


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
