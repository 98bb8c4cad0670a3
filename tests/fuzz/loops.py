"""Training loops by chance: a description that Hypothesis draws, and the ordinary script that it stands for."""

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

STEPS = 10
_BIASED = ("nn.Linear(5, 5{})", "nn.LayerNorm(5{})")
_LAYERS = {
    "tanh": "nn.Tanh()",
    "relu": "nn.ReLU()",
    "gelu": "nn.GELU()",
    "linear": _BIASED[0],
    "layer norm": _BIASED[1],
    "batch norm": "nn.BatchNorm1d(5)",
    "bilinear": "Squared()",
    "counting": "Counting()",
    "host random": "DropPath()",
    "function": "WithFunction()",
    "rounded": "Rounded()",
    "hooked": "Hooked()",
    "running mean": "Centered()",
    "asking": "Asking()",
}
_CLASSES = {  # what layers and optimizers need
    "bilinear": """
class Squared(nn.Module):
    def forward(self, x):
        return x * x.square().mean(1, keepdim=True)
""",
    "counting": """
class Counting(nn.Module):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return x * (1 + 0.1 * (self.calls % 3)) if self.calls % 4 else -x
""",
    "host random": """
class DropPath(nn.Module):
    def forward(self, x):
        return x + x.tanh() * random.random() if random.random() < 0.7 else x
""",
    "function": """
class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return 0.9 * gradient @ weight.t(), x.t() @ gradient

class WithFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(0.4 * torch.randn(5, 5))

    def forward(self, x):
        return Product.apply(x, self.weight)
""",
    "rounded": """
class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, calls):
        ctx.calls = calls
        return (x * 1e6).round() / 1e6

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (1 + 0.1 * (ctx.calls % 2)), None

class Rounded(nn.Module):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return Round.apply(x, self.calls)
""",
    "hooked": """
class Hooked(nn.Module):
    calls = 0

    def forward(self, x):
        y = 1.5 * x
        if y.requires_grad:
            y.register_hook(self.changed)
        return y

    def changed(self, gradient):
        self.calls += 1
        return gradient * 0.5 if self.calls % 3 else None
""",
    "running mean": """
class Centered(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)
        return x - self.mean
""",
    "asking": """
class Asking(nn.Module):
    def forward(self, x):
        return x.tanh() if x.detach().abs().mean() > 0.5 else 2 * x
""",
    "own": """
class Own(torch.optim.Optimizer):
    def __init__(self, parameters, lr):
        super().__init__(parameters, dict(lr=lr))
        self.steps, self.kept = 0, []

    @torch.no_grad()
    def step(self, closure=None):
        self.steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["n"] = state.get("n", 0) + 1
                mean = state.setdefault("mean", torch.zeros_like(p))
                mean.mul_(0.9).add_(p.grad, alpha=0.1)
                p.sub_(mean / (1 - 0.9 ** state["n"]), alpha=group["lr"] * (1 + 0.5 * (self.steps % 3 == 0)))
""",
    "own of data": """
class OfData(torch.optim.Optimizer):
    def __init__(self, parameters, lr):
        super().__init__(parameters, dict(lr=lr))

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["d"] = p.grad.data + 0.5 * state["d"] if "d" in state else p.grad.data.clone()
                    p.data.add_(state["d"], alpha=-group["lr"])
""",
}
_LOSSES = {
    "cross entropy": "F.cross_entropy({}, y)",
    "label smoothing": "F.cross_entropy({}, y, label_smoothing=0.1)",
    "squared error": "F.mse_loss({}, F.one_hot(y, 3).double())",
    "margin": "F.multi_margin_loss({}, y)",
    "of probabilities": "-({}).softmax(1)[torch.arange(len(y)), y].log().mean()",
}
_OPTIMIZERS = {
    "sgd": "SGD({}, lr=0.05)",
    "momentum": "SGD({}, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)",
    "adam": "Adam({}, lr=0.01)",
    "adamw": "AdamW({}, lr=0.01, amsgrad=True)",
    "rmsprop": "RMSprop({}, lr=0.01, momentum=0.5)",
    "adagrad": "Adagrad({}, lr=0.05)",
    "own": "Own({}, lr=0.05)",
    "own of data": "OfData({}, lr=0.05)",
}
_SCHEDULES = {
    "step": "StepLR({}, 3, 0.5)",
    "cosine": "CosineAnnealingLR({}, 10)",
    "warm-up": "LinearLR({}, 0.1, total_iters=5)",
}
_READS = (
    "loss before backward",
    "logits before backward",
    "loss before step",
    "gradient before step",
    "gradient after step",
    "loss at end",
)
_BEFORE = {  # what an event does before the step's forward
    "evaluate": "model.eval()\nwith torch.no_grad():\n    seen.append(model(data[0][0]).sum().item())\nmodel.train()",
    "train mode": "model.train()",
    "save": "saved = {name: value.clone() for name, value in model.state_dict().items()}",
    "load": "if saved is not None:\n    model.load_state_dict(saved)",
    "edit a weight": "with torch.no_grad():\n    model[0].weight.mul_(0.9)",
    "freeze": "model[0].requires_grad_(False)",
    "unfreeze": "model[0].requires_grad_(True)",
    "halve the rate": "for group in optimizers[0].param_groups:\n    group['lr'] *= 0.5",
    "clear the state": "for optimizer in optimizers:\n    optimizer.state.clear()",
    "add a hook": "model[0].register_forward_hook(lambda module, args, out: 0.9 * out)",
    "patch forward": "model[-1].forward = lambda x, f=model[-1].forward: 1.1 * f(x)",
    "copy the model": "seen.append(copy.deepcopy(model)(data[0][0]).sum().item())",
}
_EVENTS = (*_BEFORE, "skip the step", "step twice", "smaller batch", "two calls", "give up")
_ZERO = "for optimizer in optimizers:\n    optimizer.zero_grad({})"


@dataclass(frozen=True, kw_only=True)
class Loop:
    """What one loop does.

    Attributes:
        layers: Of the model, between its first and last `Linear`.
        loss: A key of the losses.
        optimizers: One, or one for each half of the model.
        schedule: A key of the schedules, or None.
        accumulate: Micro-batches a step.
        clip: `"norm"`, `"value"` or None.
        zero: Where gradients are cleared, and how.
        reads: What the loop looks at in every step.
        weight: What the loss is multiplied by: None, a constant, or `"annealed"`.
        events: Step number to what happens in it.
        engine: Who trains it, besides eager: the launcher's `--engine`.
    """

    layers: tuple[str, ...]
    loss: str
    optimizers: tuple[str, ...]
    schedule: str | None
    accumulate: int
    clip: str | None
    zero: str
    reads: frozenset[str]
    weight: Any
    events: tuple[tuple[int, str], ...]
    engine: str = "xla"


LOOPS = st.builds(
    Loop,
    layers=st.lists(st.sampled_from(sorted(_LAYERS)), max_size=3).map(tuple),
    loss=st.sampled_from(sorted(_LOSSES)),
    optimizers=st.lists(st.sampled_from(sorted(_OPTIMIZERS)), min_size=1, max_size=2).map(tuple),
    schedule=st.sampled_from([None, *sorted(_SCHEDULES)]),
    accumulate=st.sampled_from([1, 1, 1, 2, 3]),
    clip=st.sampled_from([None, None, "norm", "value"]),
    zero=st.sampled_from(["first", "last", "model", "to zeros"]),
    reads=st.frozensets(st.sampled_from(_READS), max_size=3),
    weight=st.sampled_from([None, None, 0.5, "annealed"]),
    events=st.lists(st.tuples(st.integers(2, 9), st.sampled_from(_EVENTS)), max_size=4).map(tuple),
    engine=st.sampled_from(["xla", "xla", "auto"]),
)


TURNS = ("flip(0)", "roll(1, 0)", "roll(2, 0)", "roll(3, 0)")


def script(loop: Loop, turn: str = "") -> str:
    """The loop as an ordinary script; it leaves `model`, `optimizers` and `seen`, the numbers that it has looked at.

    Args:
        loop: What to write down.
        turn: What to do to the rows of every batch, one of `TURNS`: eager's own noise, in sums of another order.
    """
    happening = {name for _, name in loop.events}
    parts = [
        "import copy\n" if "copy the model" in happening else "",
        "import random\n\nrandom.seed(0)" if "host random" in loop.layers else "",
        "import torch\nfrom torch import nn\nfrom torch.nn import functional as F\n",
        *(_CLASSES[name] for name in dict.fromkeys((*loop.layers, *loop.optimizers)) if name in _CLASSES),
        "torch.set_default_dtype(torch.float64)\ntorch.manual_seed(0)",
        f"model = nn.Sequential({', '.join(_layers(loop))})",
        f"optimizers = [{', '.join(_optimizers(loop))}]",
        f"schedules = [torch.optim.lr_scheduler.{_SCHEDULES[loop.schedule].format('o')} for o in optimizers]"
        if loop.schedule
        else "",
        f"data = [(torch.randn(6, 5), torch.randint(0, 3, (6,))) for _ in range({STEPS * loop.accumulate})]",
        "seen, saved = [], None" if "load" in happening or "save" in happening else "seen = []",
        f"for step in range({STEPS}):",
        _indented(_step(loop, turn)),
        "print(seen)\nfor name, value in model.state_dict().items():\n    print(name, value.double().sum().item())\n",
    ]
    return "\n".join(part for part in parts if part)


def _layers(loop: Loop) -> list[str]:
    layers = [layer for i, layer in enumerate(loop.layers) if layer != "batch norm" or layer not in loop.layers[:i]]
    # A bias before BatchNorm has a true gradient of zero; adaptive optimizers would normalize its rounding.
    normalized = layers.index("batch norm") + 1 if "batch norm" in layers else 0
    every = [_BIASED[0], *(_LAYERS[layer] for layer in layers)]
    written = [
        layer.format(", bias=False" if position < normalized else "") if layer in _BIASED else layer
        for position, layer in enumerate(every)
    ]
    return [*written, "nn.Linear(5, 3)"]


def _optimizers(loop: Loop) -> list[str]:
    halves = ["model[:-1].parameters()", "model[-1].parameters()"]
    groups = halves if len(loop.optimizers) == 2 else ["model.parameters()"]
    return [
        ("" if name in _CLASSES else "torch.optim.") + _OPTIMIZERS[name].format(group)
        for name, group in zip(loop.optimizers, groups, strict=True)
    ]


def _step(loop: Loop, turn: str) -> str:
    steps: dict[str, list[int]] = {}
    for at, name in loop.events:
        steps.setdefault(name, []).append(at)
    clear = {
        "model": "model.zero_grad()",
        "to zeros": _ZERO.format("set_to_none=False"),
    }.get(loop.zero, _ZERO.format(""))
    clip = {
        "norm": "seen.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())",
        "value": "nn.utils.clip_grad_value_(model.parameters(), 0.05)",
        None: "",
    }[loop.clip]
    lines = [_when(steps[name], _BEFORE[name]) for name in _BEFORE if name in steps]
    lines += [clear] if loop.zero != "last" else []
    start = "step" if loop.accumulate == 1 else f"step * {loop.accumulate}"
    stop = "step + 1" if loop.accumulate == 1 else f"(step + 1) * {loop.accumulate}"
    lines += [f"for x, y in data[{start} : {stop}]:", _indented(_micro_step(loop, steps, turn)), clip]
    if "gradient before step" in loop.reads:
        lines.append("if model[-1].weight.grad is not None:\n    seen.append(model[-1].weight.grad.sum().item())")
    update = "for optimizer in optimizers:\n    optimizer.step()"
    skipped = steps.get("skip the step")
    lines.append(f"if step not in {skipped}:\n{_indented(update)}" if skipped else update)
    if "step twice" in steps:
        lines.append(_when(steps["step twice"], update))
    if "gradient after step" in loop.reads:
        lines.append("if model[-1].weight.grad is not None:\n    seen.append(model[-1].weight.grad.sum().item())")
    lines.append("for schedule in schedules:\n    schedule.step()" if loop.schedule else "")
    lines += [clear] if loop.zero == "last" else []
    lines.append("seen.append(last.item())" if "loss at end" in loop.reads else "")
    return "\n".join(line for line in lines if line)


def _micro_step(loop: Loop, steps: dict[str, list[int]], turn: str) -> str:
    loss, small, twice = _LOSSES[loop.loss], steps.get("smaller batch"), steps.get("two calls")
    share = f"loss / {loop.accumulate}" if loop.accumulate > 1 else "loss"
    lines = [
        _when(small, "x, y = x[:-1], y[:-1]") if small else "",
        f"x, y = x.{turn}, y.{turn}" if turn else "",
        "out = model(x)",
        "seen.append(out.argmax(1).double().mean().item())" if "logits before backward" in loop.reads else "",
        f"loss = {loss.format('out')}",
        _when(twice, f"loss = loss + {loss.format('model(-x)')}") if twice else "",
        f"loss = loss * {'(1 - step / 20)' if loop.weight == 'annealed' else loop.weight}" if loop.weight else "",
        "seen.append(loss.item())" if "loss before backward" in loop.reads else "",
        "last = loss.detach()" if "loss at end" in loop.reads else "",
        _when(steps["give up"], "continue") if "give up" in steps else "",
        f"({share}).backward()",
        "seen.append(loss.item())" if "loss before step" in loop.reads else "",
    ]
    return "\n".join(line for line in lines if line)


def _when(steps: list[int], body: str) -> str:
    return f"if step in {sorted(set(steps))}:\n{_indented(body)}"


def _indented(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())
