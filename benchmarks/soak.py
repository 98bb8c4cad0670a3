"""10,000 steps of each kind of loop, a process each: resident memory is flat once it has warmed up.

A leak is what a loop keeps of every step: a tape, a path of the recording, a program, a copy of a model. So each kind
does something that could leave one behind. Memory is read after a fifth of the steps and at the end.
"""

import argparse
import copy
import gc
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

STEPS = 10_000


def model(width: int = 32) -> nn.Sequential:
    """Two layers."""
    return nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 4))


def batch(rows: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Random inputs, float32[rows, 16], and classes, int64[rows]."""
    return torch.randn(rows, 16), torch.randint(0, 4, (rows,))


def step(net: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """One step of an ordinary loop; returns the loss."""
    optimizer.zero_grad()
    loss = F.cross_entropy(net(x), y)
    loss.backward()
    optimizer.step()
    return loss


def plain() -> Iterator[None]:
    """Adam, a schedule, a loss that is read."""
    net = model()
    optimizer = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    while True:
        step(net, optimizer, *batch()).item()
        schedule.step()
        yield


def dropped_models() -> Iterator[None]:
    """Another model every 50 steps, an averaged copy of it that is called, and both dropped."""
    while True:
        net = model()
        optimizer = torch.optim.AdamW(net.parameters())
        for _ in range(50):
            step(net, optimizer, *batch())
            yield
        average = copy.deepcopy(net)
        with torch.no_grad():
            average(batch()[0]).sum().item()


def changing_values() -> Iterator[None]:
    """A float, an integer and a lambda that are others at every step."""
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for number in range(10**9):
        x, y = batch()
        optimizer.zero_grad()
        factor = random.random()
        scaled = (lambda tensor: tensor * factor)(net(x))  # noqa: B023 - it is called here
        loss = F.cross_entropy(scaled, y) * (1 + 1 / (number + 1)) + (number % 1000) * 1e-6
        loss.backward()
        optimizer.step()
        yield


def ragged() -> Iterator[None]:
    """Batches of 1 to 64 rows, in any order."""
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    while True:
        step(net, optimizer, *batch(random.randint(1, 64)))
        yield


def hooks() -> Iterator[None]:
    """Hooks that come and go: of a module, a result and a parameter."""
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    seen = []
    while True:
        x, y = batch()
        handles = [net[0].register_forward_hook(lambda _, __, out: out * 1.0)]
        handles.append(net[0].weight.register_hook(lambda grad: grad * 0.5))
        optimizer.zero_grad()
        outputs = net(x)
        outputs.register_hook(seen.append)
        F.cross_entropy(outputs, y).backward()
        optimizer.step()
        for handle in handles:
            handle.remove()
        seen.clear()
        yield


def evaluating() -> Iterator[None]:
    """An evaluation, a checkpoint in memory, and clipping."""
    net = model()
    optimizer = torch.optim.Adam(net.parameters())
    while True:
        for _ in range(10):
            x, y = batch()
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            yield
        net.eval()
        with torch.no_grad():
            net(batch(32)[0]).argmax(1).tolist()
        net.train()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        net.load_state_dict({name: tensor.clone() for name, tensor in net.state_dict().items()})


class OwnSteps(torch.optim.Optimizer):
    """An optimizer that nobody else wrote: momentum, with a count in Python."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.01})
        self.count = 0

    @torch.no_grad()
    def step(self, closure=None):
        """Updates every parameter."""
        self.count += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                momentum = state.setdefault("momentum", torch.zeros_like(parameter))
                momentum.mul_(0.9).add_(parameter.grad)
                parameter.sub_(momentum * (group["lr"] / (1 + self.count) ** 0.5))


def own_optimizer() -> Iterator[None]:
    """An optimizer of one's own."""
    net = model()
    optimizer = OwnSteps(net.parameters())
    while True:
        step(net, optimizer, *batch())
        yield


def adversarial() -> Iterator[None]:
    """Two models and two optimizers, and losses kept in a list."""
    maker, judge = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16)), model()
    of_maker, of_judge = torch.optim.Adam(maker.parameters()), torch.optim.Adam(judge.parameters())
    while True:
        losses = []
        for _ in range(50):
            real, made = torch.randn(8, 16), maker(torch.randn(8, 4))
            of_judge.zero_grad()
            loss = judge(real).square().mean() - judge(made.detach()).mean()
            loss.backward()
            of_judge.step()
            of_maker.zero_grad()
            fooled = judge(made).mean()
            fooled.backward()
            of_maker.step()
            losses += [loss, fooled]
            yield
        torch.stack(losses).mean().item()


class Doubled(torch.autograd.Function):
    """A function with a backward of its own."""

    @staticmethod
    def forward(ctx, x):
        """Twice `x`."""
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        """Twice the gradient."""
        (x,) = ctx.saved_tensors
        return gradient * 2 + 0 * x


def own_function() -> Iterator[None]:
    """An `autograd.Function` and a checkpointed block."""
    net, head = model(), nn.Linear(4, 4)
    optimizer = torch.optim.SGD([*net.parameters(), *head.parameters()], lr=0.01)
    while True:
        x, y = batch()
        optimizer.zero_grad()
        hidden = torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False)
        F.cross_entropy(head(Doubled.apply(hidden)), y).backward()
        optimizer.step()
        yield


def left_to_torch() -> Iterator[None]:
    """A step that is torch's: a full backward hook."""
    net = model()
    net[0].register_full_backward_hook(lambda *_: None)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    while True:
        step(net, optimizer, *batch()).item()
        yield


KINDS: dict[str, Callable[[], Iterator[None]]] = {
    kind.__name__: kind
    for kind in (
        plain, dropped_models, changing_values, ragged, hooks, evaluating, own_optimizer, adversarial, own_function,
        left_to_torch,
    )
}  # fmt: skip


def resident_bytes() -> int:
    """What this process has in memory now."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run(kind: str, engine: str, steps: int) -> dict:
    """Trains one kind of loop in this process.

    Args:
        kind: One of `KINDS`.
        engine: `"eager"` is torch without us.
        steps: How many.

    Returns:
        The memory after a fifth of the steps and at the end, in MiB, and what was compiled.
    """
    import trainingcompiler as tc
    from trainingcompiler.reporting.statistics import current as statistics

    torch.manual_seed(0)
    random.seed(0)
    if engine != "eager":
        tc.enable(tc.TrainingCompilerConfig(engine=engine, quiet=True))
    loop = KINDS[kind]()
    marks = []
    for number in range(1, steps + 1):
        next(loop)
        if number in (steps // 5, steps // 2, steps):
            marks.append(resident_bytes() / 2**20)
    compiled = None if engine == "eager" else statistics()
    return {
        "kind": kind,
        "engine": engine,
        "steps": steps,
        "warm_mib": round(marks[0], 1),
        "half_mib": round(marks[1], 1),
        "end_mib": round(marks[2], 1),
        "compiles": 0 if compiled is None else compiled.compiles,
        "compiled_steps": 0 if compiled is None else compiled.compiled_steps,
    }


def main() -> None:
    """Runs what is asked for, each kind in a process of its own, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--engines", nargs="+", choices=("eager", "xla", "auto"), default=["xla", "auto"])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    parser.add_argument("--here", action="store_true", help="in this process: one kind, one engine")
    options = parser.parse_args()
    if options.steps < 5:
        parser.error(f"--steps {options.steps}: memory is compared between a fifth of them and the end; give 5 or more")
    if options.here:
        print(json.dumps(run(options.kinds[0], options.engines[0], options.steps)))
        return
    print(
        f"{'kind':18}{'engine':8}{'warm MiB':>10}{'half MiB':>10}{'end MiB':>10}{'growth':>9}{'programs':>10}",
        flush=True,
    )
    rows = []
    for kind in options.kinds:
        for engine in options.engines:
            command = [sys.executable, __file__, "--here", "--kinds", kind, "--engines", engine]
            command += ["--steps", str(options.steps)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            row = json.loads(done.stdout.splitlines()[-1])
            rows.append(row)
            growth = row["end_mib"] - row["warm_mib"]
            print(
                f"{kind:18}{engine:8}{row['warm_mib']:10}{row['half_mib']:10}{row['end_mib']:10}{growth:10.1f}"
                f"{row['compiles']:10}",
                flush=True,
            )
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        temporary = options.json.with_suffix(".part")
        temporary.write_text(json.dumps(rows, indent=2) + "\n")
        temporary.replace(options.json)


if __name__ == "__main__":
    main()
