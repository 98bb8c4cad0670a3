"""Training loops by chance: a description that Hypothesis draws and shrinks, and the loop that it describes."""

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

ROWS, FEATURES, CLASSES = 6, 5, 3
_LAYERS = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "linear": lambda: nn.Linear(FEATURES, FEATURES),
    "layer norm": lambda: nn.LayerNorm(FEATURES),
    "batch norm": lambda: nn.BatchNorm1d(FEATURES),
    "bilinear": lambda: _Squared(),
}
_LOSSES = {
    "cross entropy": F.cross_entropy,
    "label smoothing": lambda out, y: F.cross_entropy(out, y, label_smoothing=0.1),
    "squared error": lambda out, y: F.mse_loss(out, F.one_hot(y, CLASSES).to(out.dtype)),
    "margin": F.multi_margin_loss,
    "of probabilities": lambda out, y: -out.softmax(1)[torch.arange(len(y)), y].log().mean(),
}
_OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
}
_SCHEDULES = {
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.5),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "warm-up": lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=5),
}
_READS = ("loss before backward", "logits before backward", "loss before step", "gradient before step", "loss at end")
_EVENTS = (
    "evaluate",
    "train mode",
    "save",
    "load",
    "edit a weight",
    "freeze",
    "unfreeze",
    "halve the rate",
    "clear the state",
    "skip the step",
    "smaller batch",
    "two calls",
    "copy the model",
)


class _Squared(nn.Module):
    def forward(self, x):
        return x * x.mean(1, keepdim=True)


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


LOOPS = st.builds(
    Loop,
    layers=st.lists(st.sampled_from(sorted(_LAYERS)), max_size=3).map(tuple),
    loss=st.sampled_from(sorted(_LOSSES)),
    optimizers=st.lists(st.sampled_from(sorted(_OPTIMIZERS)), min_size=1, max_size=2).map(tuple),
    schedule=st.sampled_from([None, *sorted(_SCHEDULES)]),
    accumulate=st.sampled_from([1, 1, 1, 2, 3]),
    clip=st.sampled_from([None, None, "norm", "value"]),
    zero=st.sampled_from(["first", "last", "model", "to zeros", "between"]),
    reads=st.frozensets(st.sampled_from(_READS), max_size=3),
    weight=st.sampled_from([None, None, 0.5, "annealed"]),
    events=st.lists(st.tuples(st.integers(2, 9), st.sampled_from(_EVENTS)), max_size=4).map(tuple),
)
STEPS = 10


def make(loop: Loop):
    """A factory of the loop's model and optimizers, as `parity.train` wants it."""

    def made():
        layers = [layer for i, layer in enumerate(loop.layers) if layer != "batch norm" or layer not in loop.layers[:i]]
        model = nn.Sequential(
            nn.Linear(FEATURES, FEATURES), *(_LAYERS[layer]() for layer in layers), nn.Linear(FEATURES, CLASSES)
        )
        tail = model[-1]
        if "batch norm" in layers:
            # A bias before it has a true gradient of zero; adaptive optimizers would normalize its rounding.
            for module in model[: layers.index("batch norm") + 1]:
                if getattr(module, "bias", None) is not None:
                    module.bias = None
        halves = [list(model[:-1].parameters()), list(tail.parameters())]
        groups = halves if len(loop.optimizers) == 2 else [halves[0] + halves[1]]
        named = {
            f"optimizer{i}": _OPTIMIZERS[name](g)
            for i, (name, g) in enumerate(zip(loop.optimizers, groups, strict=False))
        }
        return {"model": model, **named}

    return made


def batches(loop: Loop) -> list:
    """The data: `(float[rows, features], int64[rows])` for every micro-batch."""
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(ROWS, FEATURES, generator=generator),
            torch.randint(0, CLASSES, (ROWS,), generator=generator),
        )
        for _ in range(STEPS * loop.accumulate)
    ]


def run(loop: Loop, reverse: bool = False):
    """The loop itself, as `parity.train` wants it; `reverse` turns the rows of every batch around."""

    def train(objects: dict[str, Any], data: list) -> list[float]:
        return _Running(loop, objects, reverse).train(data)

    return train


class _Running:
    def __init__(self, loop: Loop, objects: dict[str, Any], reverse: bool):
        self.loop = loop
        self.reverse = reverse
        self.objects = objects
        self.model = objects["model"]
        self.optimizers = [value for name, value in objects.items() if name != "model"]
        self.schedules = [_SCHEDULES[loop.schedule](o) for o in self.optimizers] if loop.schedule else []
        self.seen: list[float] = []
        self.saved: Any = None

    def train(self, data: list) -> list[float]:
        count = self.loop.accumulate
        for step in range(STEPS):
            events = {event for at, event in self.loop.events if at == step}
            self.before(events, data[0][0])
            self.clear({"first", "to zeros", "model"})
            for x, y in data[step * count : (step + 1) * count]:
                if "smaller batch" in events:
                    x, y = x[:-1], y[:-1]
                if self.reverse:
                    x, y = x.flip(0), y.flip(0)
                self.micro_step(step, x, y, "two calls" in events)
            if self.loop.clip == "norm":
                self.seen.append(nn.utils.clip_grad_norm_(self.model.parameters(), 0.5).item())
            elif self.loop.clip == "value":
                nn.utils.clip_grad_value_(self.model.parameters(), 0.05)
            if "gradient before step" in self.loop.reads and self.model[-1].weight.grad is not None:
                self.seen.append(self.model[-1].weight.grad.sum().item())
            if "skip the step" not in events:
                for optimizer in self.optimizers:
                    optimizer.step()
            for schedule in self.schedules:
                schedule.step()
            self.clear({"last", "between"})
            if "loss at end" in self.loop.reads:
                self.seen.append(self.last.item())
        return self.seen

    def micro_step(self, step: int, x: torch.Tensor, y: torch.Tensor, twice: bool) -> None:
        out = self.model(x)
        if "logits before backward" in self.loop.reads:
            self.seen.append(out.argmax(1).double().mean().item())
        loss = _LOSSES[self.loop.loss](out, y)
        if twice:
            loss = loss + _LOSSES[self.loop.loss](self.model(-x), y)
        if self.loop.weight is not None:
            loss = loss * (1.0 - step / 20 if self.loop.weight == "annealed" else self.loop.weight)
        if "loss before backward" in self.loop.reads:
            self.seen.append(loss.item())
        if loss.requires_grad:
            (loss / self.loop.accumulate).backward()
        if "loss before step" in self.loop.reads:
            self.seen.append(loss.item())
        self.last = loss.detach()

    def clear(self, moments: set[str]) -> None:
        if self.loop.zero not in moments:
            return
        if self.loop.zero == "model":
            self.model.zero_grad()
            return
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=self.loop.zero != "to zeros")

    def before(self, events: set[str], x: torch.Tensor) -> None:
        model = self.model
        if "evaluate" in events:
            model.eval()
            with torch.no_grad():
                self.seen.append(model(x).sum().item())
        if "train mode" in events or "evaluate" in events:
            model.train()
        if "save" in events:
            self.saved = {name: value.clone() for name, value in model.state_dict().items()}
        if "load" in events and self.saved is not None:
            model.load_state_dict(self.saved)
        if "edit a weight" in events:
            with torch.no_grad():
                model[0].weight.mul_(0.9)
        if "freeze" in events:
            model[0].requires_grad_(False)
        if "unfreeze" in events:
            model[0].requires_grad_(True)
        if "halve the rate" in events:
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] *= 0.5
        if "clear the state" in events:
            for optimizer in self.optimizers:
                optimizer.state.clear()
        if "copy the model" in events:
            import copy

            self.seen.append(copy.deepcopy(model)(x).sum().item())
