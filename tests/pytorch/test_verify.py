"""The sentinel: a program's first run is compared with torch's, and a program that differs is torch's to run."""

import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
import torch
from small import batches, made, mlp, train_on
from torch import nn

import trainingcompiler as tc
from trainingcompiler.cache import executables
from trainingcompiler.errors import FallbackError
from trainingcompiler.frameworks.pytorch.capture.inspection import Inspection
from trainingcompiler.frameworks.pytorch.graph.ir import Graph, Node, Ref
from trainingcompiler.frameworks.pytorch.operators import LOWERINGS
from trainingcompiler.frameworks.pytorch.verify import sentinel as verify
from trainingcompiler.reporting.events import FellBack, Note, PhaseEnded, subscribe
from trainingcompiler.targets.target import Target


@pytest.fixture
def seen():
    events = []
    unsubscribe = subscribe(events.append)
    yield events
    unsubscribe()


@pytest.fixture
def wrong_tanh(monkeypatch):
    right = LOWERINGS["aten.tanh.default"]
    monkeypatch.setitem(LOWERINGS, "aten.tanh.default", lambda x: right(x) + jnp.asarray(1e-2, x.dtype))


@pytest.fixture
def wrong_whole(monkeypatch):
    """XLA gets a program wrong, and each operator of it right: what a fusion of it may do."""
    inner = verify._seen
    monkeypatch.setattr(verify, "_seen", lambda array: inner(array) * 1.5 if inner(array).shape == () else inner(array))


def trained(cache_dir, model=mlp, optimizer=torch.optim.SGD, count=6, evaluates=False, **config):
    """The state, losses and evaluations of a short training run, compiled; in torch, without a folder."""
    torch.manual_seed(0)
    if cache_dir is not None:
        options = {"engine": "xla", "quiet": True, "cache_dir": str(cache_dir), **config}
        tc.enable(tc.TrainingCompilerConfig(**options))
    try:
        objects = made(model, optimizer, lr=0.1)()
        losses = train_on(objects["model"], objects["optimizer"], batches(count))
        if evaluates:
            with torch.no_grad():
                losses += objects["model"](batches(1)[0][0]).flatten().tolist()
        return [value.clone() for value in objects["model"].state_dict().values()], losses
    finally:
        tc.disable()


def assert_torchs(run, other, tolerance=1e-5):
    """The training is that of torch, to float32's rounding over a few steps."""
    for one, two in zip(run[0], other[0], strict=True):
        torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)
    assert run[1] == pytest.approx(other[1], rel=tolerance, abs=tolerance)


def verified(events) -> list[str]:
    return [event.detail for event in events if isinstance(event, PhaseEnded) and event.name == "verify"]


def fallbacks(events) -> list[FellBack]:
    return [event for event in events if isinstance(event, FellBack)]


def test_a_program_is_verified_the_first_time_it_is_used(tmp_path, seen):
    assert_torchs(trained(tmp_path), trained(None))
    first = verified(seen)
    assert first and all("results as PyTorch's to " in detail for detail in first) and not fallbacks(seen)
    assert len(list(tmp_path.glob(f"*/*{executables.VERDICT}"))) == len(first)
    seen.clear()
    trained(tmp_path)
    assert not verified(seen)  # the verdict lies beside the executable


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_right_is_not_refused(optimizer, dtype, tmp_path, seen):
    def model():
        parts = nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(24, 4)
        return nn.Sequential(nn.Unflatten(1, (1, 8)), *parts).to(dtype)

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(0)
        tc.enable(tc.TrainingCompilerConfig(engine="xla", quiet=True, cache_dir=str(tmp_path)))
        objects = made(model, optimizer, lr=0.01)()
        train_on(objects["model"], objects["optimizer"], [(x.to(dtype), y) for x, y in batches(4)])
    finally:
        tc.disable()
        torch.set_default_dtype(before)
    assert verified(seen) and not fallbacks(seen)


def test_a_wrong_operator_is_named_and_torch_trains(tmp_path, wrong_tanh, seen):
    assert_torchs(trained(tmp_path), trained(None))
    (said,) = fallbacks(seen)
    assert said.operator == "aten.tanh.default" and said.where.startswith("small.py:")
    assert "wrongly: aten.tanh.default gives " in said.reason and " where PyTorch gives " in said.reason


def test_the_verdict_of_a_wrong_program_is_kept(tmp_path, monkeypatch, seen):
    right = LOWERINGS["aten.tanh.default"]
    monkeypatch.setattr(
        "trainingcompiler.frameworks.pytorch.lowering.cache_key._KNOWN_CODE",
        ("trainingcompiler", "jax", "test_verify", "builtins"),
    )
    monkeypatch.setitem(LOWERINGS, "aten.tanh.default", lambda x: right(x) + jnp.asarray(1e-2, x.dtype))
    trained(tmp_path)
    seen.clear()
    assert_torchs(trained(tmp_path), trained(None))
    assert len(fallbacks(seen)) == 1 and not verified(seen)


def test_where_only_the_whole_program_differs_a_report_is_written(tmp_path, wrong_whole, seen):
    assert_torchs(trained(tmp_path), trained(None))
    said = fallbacks(seen)[0]
    assert "Each of its operators alone is right, only the whole program differs: please report " in said.reason
    path = next(tmp_path.glob("*/*-difference.txt"))
    assert str(path) in said.reason and "https://github.com/openxla/xla/issues" in said.reason
    text = path.read_text()
    assert "jaxlib " in text and "StableHLO:" in text and "HloModule" in text


def test_noise_leaves_the_values_alone_that_a_loss_refuses_others_of(tmp_path, wrong_whole):
    """torch's own noise is asked for where results differ; a target of 1.0000001 would end the script."""

    def train():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1), nn.Sigmoid())
        optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
        for x, y in batches(4):
            optimizer.zero_grad()
            loss = nn.BCELoss()(model(x).squeeze(1), (y > 1).float())
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return list(model.parameters()), losses

    tc.enable(tc.TrainingCompilerConfig(engine="xla", quiet=True, cache_dir=str(tmp_path)))
    try:
        run = train()
    finally:
        tc.disable()
    assert_torchs(run, train())


@pytest.mark.parametrize(("given", "differs"), [(0.0, False), (1000.0, True)])
def test_a_sum_that_is_nothing_but_rounding_is_held_to_torchs_own(given, differs):
    """Whole numbers have no noise; that torch's sum is none of the exact one shows in float64."""
    rows, float32 = 10_007, torch.float32
    nodes = [
        Node("aten.mul.Scalar", (Ref(0), 0.1), {}, (1,), (((rows,), float32),)),
        Node("aten.mean.default", (Ref(1),), {}, (2,), (((), float32),)),
        Node("aten.sub.Tensor", (Ref(1), Ref(2)), {}, (3,), (((rows,), float32),)),
        Node("aten.sum.default", (Ref(3),), {}, (4,), (((), float32),)),
    ]
    values = torch.arange(rows, dtype=float32)
    assert (values * 0.1 - (values * 0.1).mean()).sum().abs() > 1e-2  # it is 0
    run = Inspection(
        name="train_step", where=None, steps=True, graph=Graph([0], nodes), inputs={0: values},
        results={1: values * 0.1, 4: torch.tensor(given)}, replaced={},
        names={1: "gradient of the weight", 4: "gradient of the bias"},
    )  # fmt: skip
    judge = verify.Judge(run, [1, 4])
    judge.replay()
    assert judge.judge(run.results).differs == differs


def test_a_comparison_that_torch_refuses_is_said_and_ends_nothing(tmp_path, monkeypatch, seen):
    def refuses(*_, **__):
        raise RuntimeError("all elements of target should be between 0 and 1")

    monkeypatch.setattr(verify.Judge, "judge", refuses)
    assert_torchs(trained(tmp_path), trained(None))
    assert any("replaying it failed (RuntimeError: all elements" in e.text for e in seen if isinstance(e, Note))
    assert not fallbacks(seen)


def test_an_evaluation_is_verified_and_training_stays_compiled(tmp_path, monkeypatch, seen):
    inner = verify.Sentinel._described

    def only_evaluations(self, executable, verdict):
        if self._name == "evaluation":
            verdict.over, verdict.worst = ["a result"], (1.0, 1.0, 2.0, "a result")
        return inner(self, executable, verdict)

    monkeypatch.setattr(verify.Sentinel, "_described", only_evaluations)
    monkeypatch.setattr(verify.Verdict, "differs", property(lambda verdict: bool(verdict.over)))
    run = trained(tmp_path, evaluates=True)
    assert any(detail.startswith("evaluation at test_verify.py:") for detail in verified(seen))
    assert_torchs(run, trained(None, evaluates=True))


def test_off_and_always(tmp_path, seen):
    trained(tmp_path / "off", verify="off")
    assert not verified(seen)
    trained(tmp_path / "always", verify="always")
    steps = [detail for detail in verified(seen) if detail.startswith("train_step")]
    assert len(steps) >= 5  # every step, and not only the first


def test_no_fallback_is_an_error_before_anything_is_trained(tmp_path, wrong_tanh):
    torch.manual_seed(0)
    tc.enable(tc.TrainingCompilerConfig(engine="xla", quiet=True, cache_dir=str(tmp_path), fallback="error"))
    try:
        model = mlp()
        before = [value.clone() for value in model.state_dict().values()]
        with pytest.raises(FallbackError, match=r"aten\.tanh\.default gives"):
            train_on(model, torch.optim.SGD(model.parameters(), lr=0.1), batches(3))
        assert all(map(torch.equal, before, model.state_dict().values()))
    finally:
        tc.disable()


def test_what_memory_does_not_allow_is_skipped_and_said(tmp_path, monkeypatch, seen):
    monkeypatch.setattr(verify, "host_bytes", lambda: 1000)
    trained(tmp_path)
    assert not verified(seen) and not list(tmp_path.glob(f"*/*{executables.VERDICT}"))
    notes = [event.text for event in seen if isinstance(event, Note)]
    assert any("is not compared with PyTorch's results: that needs " in text for text in notes), notes


def sentinel_of_one_operator(rows: int) -> verify.Sentinel:
    node = Node("aten.relu.default", (Ref(0),), {}, (1,), (((rows,), torch.float32),))
    return verify.Sentinel("train_step", "train.py:8", Graph([0], [node]), [0], [1], {}, {})


def executable_for(**target) -> SimpleNamespace:
    memory = SimpleNamespace(argument_bytes=0, added_bytes=0)
    options = {"platform": "cpu", "description": "a device", "device_count": 1, **target}
    return SimpleNamespace(target=Target(**options), memory=memory, program=SimpleNamespace(digest=None))


def ran_unverified(sentinel: verify.Sentinel, executable: SimpleNamespace) -> bool:
    sentinel.begin(executable.program, executable.target, "first")
    with sentinel.watching(executable, (), ()) as watch:
        watch.ran([], (), ())
    return sentinel._graph is None


def test_what_several_devices_run_is_skipped_and_said_once(seen, monkeypatch):
    monkeypatch.setattr(verify, "_said", set())
    for _ in range(2):
        assert ran_unverified(sentinel_of_one_operator(4), executable_for(device_count=2))
    notes = [event.text for event in seen if isinstance(event, Note)]
    assert notes == ["what several devices or workers compute is not compared with PyTorch's results"]


def test_a_large_program_of_a_gpu_is_skipped_and_said(seen):
    assert ran_unverified(sentinel_of_one_operator(2**28), executable_for(platform="cuda", compute_capability=(9, 0)))
    (note,) = (event.text for event in seen if isinstance(event, Note))
    assert note == (
        "train_step at train.py:8 is not compared with PyTorch's results: it is a GPU's, and replaying its 1.00 GiB of "
        "values is too much for the CPU"
    )


SCRIPT = """
import torch
from torch import nn
torch.manual_seed(0)
model = nn.Linear(6, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
for _ in range(3):
    optimizer.zero_grad()
    loss = -torch.log((model(torch.ones(8, 6)).sigmoid() * 0.04).prod())
    loss.backward()
    optimizer.step()
    print(loss.item())
"""


@pytest.mark.parametrize("engine", ["xla", "auto"])
def test_denormal_numbers_are_torchs_and_said(tmp_path, engine):
    path = tmp_path / "train.py"
    path.write_text(textwrap.dedent(SCRIPT))
    plain = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=True)
    command = [sys.executable, "-m", "trainingcompiler.launch", "--engine", engine, str(path)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    # One unit in the last place of a denormal is 1e-2 of it, and less than 1e-4 of its logarithm.
    assert [float(x) for x in done.stdout.split()] == pytest.approx(
        [float(x) for x in plain.stdout.split()], rel=1e-4, nan_ok=True
    )
    assert "XLA on a CPU takes numbers below 1.2e-38 (denormal ones) for 0, and so " in done.stderr
