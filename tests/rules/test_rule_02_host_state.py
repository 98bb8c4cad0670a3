"""Nothing is baked in: what a forward reads of Python itself counts as it is at each call."""

import pytest
from rule import holds, run

LOOP = """
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for index, (x, y) in enumerate(DATA):
    {change}
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    print(loss.item())
report(model)
"""

ATTRIBUTE = """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.alpha = mlp(), 1.0
    def forward(self, x):
        return self.net(x) * self.alpha
model = Model()
"""
CONFIGURATION = """
from types import SimpleNamespace
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.config = mlp(), SimpleNamespace(scale=SimpleNamespace(alpha=1.0))
    def forward(self, x):
        return self.net(x) * self.config.scale.alpha
model = Model()
"""
GLOBAL = """
ALPHA = 1.0
def scaled(x):
    return x * ALPHA
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()
    def forward(self, x):
        return scaled(self.net(x))
model = Model()
"""
CLOSURE = """
def made():
    alpha = 1.0
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()
        def forward(self, x):
            return self.net(x) * alpha
    def anneal(value):
        nonlocal alpha
        alpha = value
    return Model(), anneal
model, anneal = made()
"""
CLASS = """
class Model(nn.Module):
    alpha = 1.0
    def __init__(self):
        super().__init__()
        self.net = mlp()
    def forward(self, x):
        return self.net(x) * self.alpha
model = Model()
"""
FUNCTION = """
strength = {"alpha": 1.0}
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.last = mlp(), lambda x: x * strength["alpha"]
    def forward(self, x):
        return self.last(self.net(x))
model = Model()
"""

ANNEALED = {
    "attribute": (ATTRIBUTE, "model.alpha = {}"),
    "configuration": (CONFIGURATION, "model.config.scale.alpha = {}"),
    "global": (GLOBAL, "ALPHA = {}"),
    "closure": (CLOSURE, "anneal({})"),
    "class": (CLASS, "Model.alpha = {}"),
}


@pytest.mark.parametrize(("model", "change"), ANNEALED.values(), ids=ANNEALED)
def test_an_annealed_number_is_an_input(model, change, tmp_path):
    ran = holds(model + LOOP.format(change=change.format("1.0 - index / 40")), tmp_path)
    assert ran.compiles <= 2


@pytest.mark.parametrize(
    ("model", "change"), [*ANNEALED.values(), (FUNCTION, "strength['alpha'] = {}")], ids=[*ANNEALED, "function"]
)
def test_a_number_changed_now_and_then(model, change, tmp_path):
    holds(model + LOOP.format(change=change.format("1.0 if index < 12 else 0.5")), tmp_path)


def test_a_number_changed_between_call_and_backward(tmp_path):
    """The call has seen the old one, also where it is captured, or replayed, after the change."""
    holds(
        ATTRIBUTE
        + """
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for index, (x, y) in enumerate(DATA):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    model.alpha = 1.0 - index / 40
    loss.backward()
    optimizer.step()
    print(loss.item())
report(model)
""",
        tmp_path,
    )


def test_a_number_that_decides(tmp_path):
    """Each way that Python takes by it is a program."""
    model = ATTRIBUTE.replace("self.net(x) * self.alpha", "self.net(x) * (2 if self.alpha > 0.8 else 1)")
    ran = holds(model + LOOP.format(change="model.alpha = 1.0 - index / 40"), tmp_path)
    assert ran.compiles == 2


def test_a_counter_that_no_forward_reads_costs_nothing(tmp_path):
    ran = holds(ATTRIBUTE + LOOP.format(change="model.batches_seen = index"), tmp_path)
    assert ran.compiles == 1


@pytest.mark.parametrize(
    "noise", ["float(np.random.rand())", "random.random()"], ids=["numpy's generator", "python's generator"]
)
def test_host_randomness(noise, tmp_path):
    model = ATTRIBUTE.replace("self.net(x) * self.alpha", f"self.net(x) * {noise}")
    seeded = "import random\nimport numpy as np\nrandom.seed(1)\nnp.random.seed(1)\n"
    drawn = "print(random.random(), np.random.rand())\n"  # as often as in eager
    ran = holds(seeded + model + LOOP.format(change="pass") + drawn, tmp_path)
    assert ran.compiles <= 2


def test_a_forward_that_counts(tmp_path):
    model = GLOBAL.replace("return x * ALPHA", "global ALPHA; ALPHA *= 0.9; return x * ALPHA")
    ran = holds(model + LOOP.format(change="pass") + "print(ALPHA)\n", tmp_path)
    assert ran.compiles <= 2


def test_fallback_error_stops_there(tmp_path):
    model = ATTRIBUTE.replace(
        "return self.net(x) * self.alpha", "y = self.net(x); y.register_hook(lambda g: g * g.sum().item()); return y"
    )
    with pytest.raises(AssertionError, match="asks for a value") as stopped:
        run(model + LOOP.format(change="pass"), tmp_path, "--engine=xla", "--fallback=error")
    assert "--fallback=eager" in str(stopped.value)
