"""Gradient checkpointing: the same training, what is computed again is computed again, and memory falls."""

import functools
import random
import weakref

import jax
import pytest
import torch
from parity import assert_same_training
from small import batches, made, mlp, train_on
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import trainingcompiler as tc
from trainingcompiler.frameworks.pytorch.aot.step_program import compile_step, step_program
from trainingcompiler.frameworks.pytorch.capture import inspection
from trainingcompiler.frameworks.pytorch.graph.ir import BARRIER, Graph, Node, Ref
from trainingcompiler.frameworks.pytorch.graph.passes import run_passes
from trainingcompiler.frameworks.pytorch.verify.compare import check
from trainingcompiler.targets.target import Target

KINDS = {"plain": None, "non-reentrant": False, "reentrant": True}
LAYERS = 4


class Blocks(nn.Module):
    """Residual blocks of 8 -> 32 -> 8 features, checkpointed or not.

    Args:
        kind: `use_reentrant`; None computes nothing again.
        dropout: In every block.
        nested: Whether the inner half of a block is checkpointed once more.
    """

    def __init__(self, kind, dropout=0.0, nested=False, layers=LAYERS, width=32):
        super().__init__()
        self.kind, self.nested = kind, nested
        self.stem = nn.Linear(8, 8)
        self.up = nn.ModuleList(nn.Linear(8, width) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(width, 8) for _ in range(layers))
        self.drop, self.head = nn.Dropout(dropout), nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + self._run(functools.partial(self._block, up, down), x)
        return self.head(x)

    def _block(self, up, down, x):
        inner = self._run if self.nested else lambda function, x: function(x)
        return self.drop(down(inner(lambda x: F.gelu(self.drop(up(x))), x)))

    def _run(self, function, x):
        return function(x) if self.kind is None else checkpoint(function, x, use_reentrant=self.kind)


def adamw(kind, **options):
    return made(lambda: Blocks(kind, **options), torch.optim.AdamW, lr=1e-2)


def loss_of(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def lowered(kind) -> str:
    """The StableHLO of a step."""
    model = Blocks(kind)
    program = step_program(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_of, batches(1)[0])
    assert program.recomputes == (kind is not None)
    with jax.enable_x64(True):
        shapes = [[jax.ShapeDtypeStruct(s.shape, s.dtype) for s in specs] for specs in (program.state, program.inputs)]
        return jax.jit(program.function).lower(*map(tuple, shapes)).as_text()


def inspected(kind) -> inspection.Inspection:
    """The last step of a short run."""
    seen: list[inspection.Inspection] = []
    inspection.inspector = seen.append
    tc.enable(tc.TrainingCompilerConfig(engine="xla", fallback="error", quiet=True))
    try:
        objects = adamw(kind)()
        train_on(objects["model"], objects["optimizer"], batches(3))
    finally:
        inspection.inspector = None
        tc.disable()
    return seen[-1]


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize("kind", [False, True], ids=["non-reentrant", "reentrant"])
def test_trains_what_eager_trains(kind, nested):
    assert_same_training(adamw(kind, nested=nested), loop, batches(24), max_compiles=1)


@pytest.mark.parametrize("kind", [False, True], ids=["non-reentrant", "reentrant"])
def test_dropout_is_the_one_of_forward(kind):
    """Eager draws other masks; but the compiled model without checkpointing draws the same ones."""
    losses = {}
    for which in (None, kind):
        torch.manual_seed(0)
        tc.enable(tc.TrainingCompilerConfig(engine="xla", fallback="error", quiet=True))
        try:
            objects = adamw(which, dropout=0.3)()
            losses[which] = train_on(objects["model"], objects["optimizer"], batches(24))
        finally:
            tc.disable()
    assert losses[kind] == pytest.approx(losses[None], rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_each_block_is_behind_a_barrier(kind):
    assert lowered(KINDS[kind]).count("optimization_barrier") == (LAYERS if KINDS[kind] is not None else 0)


@pytest.mark.parametrize("kind", [False, True], ids=["non-reentrant", "reentrant"])
def test_memory_falls(kind):
    rows, layers, width = 4096, 8, 128
    temporary_bytes = {}
    for which in (None, kind):
        model = Blocks(which, layers=layers, width=width)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = compile_step(model, optimizer, loss_of, batches(1, rows=rows)[0], Target.local())
        temporary_bytes[which] = step.memory.temporary_bytes
    assert temporary_bytes[None] > layers * rows * width * 4  # at least one array a block is kept for backward
    assert temporary_bytes[kind] < 0.5 * temporary_bytes[None]


def test_a_barrier_waits_for_the_gradients_of_the_block_behind_it():
    """Or XLA puts them off, and keeps what was computed again for all blocks."""
    seen = inspected(False)
    results = list(seen.results)
    *_, (_, arranged) = run_passes(seen.graph, results, "cpu")
    nodes = arranged.nodes
    places = [place for place, node in enumerate(nodes) if node.operator == BARRIER]
    assert len(places) == LAYERS
    for start, place in zip(places, places[1:], strict=False):
        read = seen.graph.live_nodes([argument.id for argument in nodes[place].args])
        of_weights = [node for node in nodes[start:place] if node.metas[0] and node.metas[0][0] in ((32, 8), (8, 32))]
        computed = [node for node in of_weights if node.operator == "aten.mm.default"]
        assert len(computed) == 2 and all(node in read for node in computed)


def test_a_barrier_keeps_what_is_read_behind_it_and_no_more():
    """A value that only a dead node reads would be computed, and kept from forward to backward."""
    meta = ((2,), torch.float32)
    read, unread, behind, dead = 2, 3, 4, 5
    graph = Graph(
        inputs=[1],
        nodes=[
            Node("aten.exp.default", (Ref(1),), {}, (read,), (meta,)),
            Node("aten.sin.default", (Ref(1),), {}, (unread,), (meta,)),
            Node(BARRIER, (Ref(unread), Ref(read)), {"since": 1}, (dead, behind), (None, None)),
            Node("aten.cos.default", (Ref(dead),), {}, (6,), (meta,)),
            Node("aten.neg.default", (Ref(behind),), {}, (7,), (meta,)),
        ],
    )
    exp, barrier, neg = graph.live_nodes([7])
    assert (exp.operator, neg.operator) == ("aten.exp.default", "aten.neg.default")
    assert (barrier.args, barrier.outputs, barrier.metas) == ((Ref(read),), (behind,), (None,))
    assert graph.live_nodes([6, 7]) == graph.nodes  # the recorded barrier stays as it was


def test_check_replays_it():
    verdict = check(inspected(False))
    assert verdict.first is None and not verdict.over


def test_autocast_and_a_mask_made_outside_of_the_block():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 4)

        def block(self, x, mask):
            q, k, v = self.qkv(x).split(8, -1)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        def forward(self, x):
            x = x[:, None, :] * torch.arange(1, 5)[:, None]
            mask = torch.arange(4)[None, :] <= torch.arange(4)[:, None]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                x = checkpoint(self.block, x, mask, use_reentrant=False)
            return self.head(x.mean(1).to(self.head.weight.dtype))

    make = made(Attends, torch.optim.SGD, lr=0.1)
    assert_same_training(make, loop, batches(24), max_compiles=1, dtypes=(torch.float32,))


def loop(objects, data):
    return train_on(objects["model"], objects["optimizer"], data)


# -- a block's Python, which eager runs again in backward -----------------------------------------------------------


class Counting(nn.Module):
    """A block that leaves traces before, between and behind what a gradient needs.

    Args:
        scale: Gives a factor for its argument, at each call.
        asks: Whether it asks for a value.
    """

    def __init__(self, scale, asks):
        super().__init__()
        self.asks = asks
        self.layers, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.scale, self.trace = scale, []

    def forward(self, x):
        self.trace.append(1)
        y = self.norm(self.layers(x * self.scale()))
        if self.asks and y.detach().abs().max() > 1e9:  # a question whose answer is the first run's
            y = y / 2
        self.trace.append(2)
        y = torch.sin(y + 0.01 * torch.randn_like(y))
        self.trace.append(3)  # torch stops a block that is not reentrant before
        return y + 1


def traced(kind, scale=lambda: 1.0, asks=True):
    """A model and its optimizer: two blocks, of which the second sees the first's result."""

    def make():
        random.seed(1)
        model = nn.ModuleDict({"stem": nn.Linear(8, 8), "block": Counting(scale, asks), "head": nn.Linear(8, 4)})
        return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.05)}

    def loop(objects, data):
        model, losses = objects["model"], []
        block, lengths = model["block"], []
        for x, y in data:
            objects["optimizer"].zero_grad()
            hidden = model["stem"](x)
            for _ in range(2):
                hidden = checkpoint(block, hidden, use_reentrant=kind)
            lengths.append(float(len(block.trace)))
            loss = F.cross_entropy(model["head"](hidden), y)
            loss.backward()
            objects["optimizer"].step()
            losses.append(loss.item())
        return [*losses, *lengths, *block.trace, random.random(), torch.rand(1).item()]

    return make, loop


@pytest.mark.parametrize("kind", [False, True], ids=["non-reentrant", "reentrant"])
def test_a_blocks_python_runs_again_in_backward(kind):
    make, loop = traced(kind)
    run = assert_same_training(make, loop, batches(), dtypes=(torch.float64,))
    assert run.observed.count(3.0) == (48 if kind is False else 96)  # traces of 24 steps


def test_a_block_that_computes_something_else_when_it_runs_again():
    """Backward's gradients are those of the second run's numbers: torch runs such steps, and Python runs as often."""
    steps = []

    def scale():
        steps.append(1)
        return random.random() if len(steps) > 40 else 1.0

    make, loop = traced(False, scale=scale, asks=False)

    def counted(objects, data):
        steps.clear()
        return loop(objects, data)

    run = assert_same_training(make, counted, batches(), dtypes=(torch.float64,), may_fall_back=True)
    assert [event.reason for event in run.fallbacks()] == [
        "a checkpointed block computes something else when it runs again"
    ]


def test_a_block_of_a_step_that_torch_runs_runs_again_too():
    calls = []

    def block(x):
        calls.append(1)
        return torch.tanh(x)

    def loop(objects, data):
        calls.clear()
        model, optimizer, seen = objects["model"], objects["optimizer"], []
        for index, (x, y) in enumerate(data):
            optimizer.zero_grad()
            loss = F.cross_entropy(checkpoint(block, model(x), use_reentrant=False), y)
            if index == 8:  # a hook that torch has to run
                model[0].weight.register_post_accumulate_grad_hook(lambda parameter: calls.append(0))
            loss.backward()
            optimizer.step()
            seen += [loss.item(), len(calls)]
        return seen

    assert_same_training(
        made(mlp, torch.optim.SGD, lr=0.1), loop, batches(), dtypes=(torch.float64,), may_fall_back=True
    )


@pytest.mark.parametrize("kind", [False, True], ids=["non-reentrant", "reentrant"])
def test_what_a_block_was_given_is_let_go_after_backward(kind):
    """Or it would be a result of the program."""

    def loop(objects, data):
        model, optimizer, losses = objects["model"], objects["optimizer"], []
        for index, (x, y) in enumerate(data):
            optimizer.zero_grad()
            hidden = model[0](x)
            given = weakref.ref(hidden)
            loss = F.cross_entropy(checkpoint(model[1:], hidden, use_reentrant=kind), y)
            del hidden
            loss.backward()
            assert given() is None or index < 2  # a new path is run on fake tensors: its frames wait for gc
            optimizer.step()
            losses.append(loss.item())
        return losses

    assert_same_training(made(mlp, torch.optim.SGD, lr=0.1), loop, batches(), dtypes=(torch.float64,))


def test_a_block_runs_again_in_each_backward_through_it():
    calls = []

    def block(x):
        calls.append(1)
        return torch.tanh(x)

    def loop(objects, data):
        calls.clear()
        model, optimizer, seen = objects["model"], objects["optimizer"], []
        for x, y in data:
            optimizer.zero_grad()
            loss = F.cross_entropy(checkpoint(block, model(x), use_reentrant=False), y)
            loss.backward(retain_graph=True)
            (0.1 * loss).backward()
            optimizer.step()
            seen += [loss.item(), len(calls)]
        return seen

    assert_same_training(made(mlp, torch.optim.SGD, lr=0.1), loop, batches(), dtypes=(torch.float64,))
