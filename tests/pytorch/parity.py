"""Trains one loop three times - eagerly, eagerly with other rounding, and compiled - and compares everything.

A fixed float32 bound is wrong both ways: where a true gradient is zero (BERT's key.bias), Adam normalizes the rounding
itself, and eager differs from its own twin by more than 100%. So float32 is held to three times the difference between
eager and a twin that sums in another order (one thread instead of two; on tiny models that often changes nothing),
and to 1e-4 where the twin is quieter. float64 leaves no room for rounding: 1e-7.
"""

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import trainingcompiler as tc
from trainingcompiler.reporting.events import Event, FellBack, subscribe
from trainingcompiler.reporting.statistics import RunStatistics
from trainingcompiler.reporting.statistics import current as statistics

DTYPES = (torch.float64, torch.float32) if os.environ.get("TEST_ALL") else (torch.float64,)
"""What to train in; float32, with its two twins, takes twice as long as float64 and shows less."""
FLOAT64_TOLERANCE = 1e-7  # two orders of summation of 10^3 terms differ by about 1e-13; 20 steps may amplify it
FLOAT32_TOLERANCE = 1e-4  # the same in float32: about 1e-6 a step, amplified over 20 steps
TWIN_FACTOR = 3.0  # the twin is one sample of the noise; a second sample is rarely three times as large


@dataclass
class Run:
    """What a loop leaves behind.

    Attributes:
        observed: What the loop itself has seen: losses, norms, counts.
        objects: The modules and optimizers, by name.
        events: What trainingcompiler has said, in order.
        statistics: Its counts.
    """

    observed: list[float]
    objects: dict[str, Any]
    events: list[Event] = field(default_factory=list)
    statistics: RunStatistics | None = None

    def fallbacks(self) -> list[FellBack]:
        """Every step that ran eagerly because it could not be compiled."""
        return [event for event in self.events if isinstance(event, FellBack)]


Loop = Callable[[dict[str, Any], list], list[float]]


def train(
    make: Callable[[], dict[str, Any]], loop: Loop, data: list, *, compiled: bool, seed: int = 0, **config
) -> Run:
    """Runs `loop(make(), data)`, compiled or not."""
    if not compiled:
        torch.manual_seed(seed)
        objects = make()
        return Run(loop(objects, data), objects)
    run = Run([], {})
    before = copy.copy(statistics())
    unsubscribe = subscribe(run.events.append)
    tc.enable(tc.TrainingCompilerConfig(**{"engine": "xla", "quiet": True, **config}))
    try:
        torch.manual_seed(seed)
        run.objects = make()  # after enabling, as under the launcher
        run.observed = loop(run.objects, data)
    finally:
        tc.disable()
        unsubscribe()
    after = statistics()
    run.statistics = RunStatistics(
        steps=after.steps - before.steps,
        compiled_steps=after.compiled_steps - before.compiled_steps,
        eager_steps=after.eager_steps - before.eager_steps,
        compiles=after.compiles - before.compiles,
        fallbacks=after.fallbacks - before.fallbacks,
        launches=after.launches - before.launches,
        host_reads=after.host_reads - before.host_reads,
    )
    return run


def assert_same_training(
    make: Callable[[], dict[str, Any]],
    loop: Loop,
    data: list,
    *,
    max_compiles: int | None = None,
    may_fall_back: bool = False,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    float64_tolerance: float = FLOAT64_TOLERANCE,
    **config,
) -> Run:
    """Asserts that the compiled loop trains the model that eager trains.

    Args:
        make: Makes the modules and optimizers, by name, from torch's seed. Built under each dtype as default.
        loop: An ordinary loop over the data, at least 20 steps; returns what it has observed.
        data: Batches; floating tensors are converted to the dtype under test.
        max_compiles: How many programs the loop may take.
        may_fall_back: Whether steps may run eagerly.
        dtypes: What to train in.
        float64_tolerance: For models that compute in float32 inside, whatever their parameters are.
        **config: For `TrainingCompilerConfig`.

    Returns:
        The compiled run in the last dtype.
    """
    for dtype in dtypes:
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            batches = _converted(data, dtype)
            eager = train(make, loop, _clone(batches), compiled=False)
            twins = _twins(make, loop, batches) if dtype is torch.float32 else []
            run = train(make, loop, _clone(batches), compiled=True, **config)
        finally:
            torch.set_default_dtype(default)
        if not may_fall_back:
            assert not run.fallbacks(), run.fallbacks()
            assert run.statistics.compiled_steps >= run.statistics.eager_steps
        assert_same(eager, run, twins, float64_tolerance)
        if max_compiles is not None:
            assert run.statistics.compiles <= max_compiles, run.statistics
    return run


def assert_same(
    eager: Run,
    compiled: Run,
    twin: Run | Sequence[Run] | None = None,
    float64_tolerance: float = FLOAT64_TOLERANCE,
    floor: float = FLOAT32_TOLERANCE,
) -> None:
    """Asserts that two runs have seen the same and left the same behind.

    Args:
        eager: What is right.
        compiled: What to judge.
        twin: A second eager run with other rounding, for float32, or several, of which the noisiest counts for each
            value; None for float64.
        float64_tolerance: The largest relative difference without a twin.
        floor: The largest relative difference with one, however quiet it is.
    """
    right, judged = dict(_values(eager)), dict(_values(compiled))
    twins = [twin] if isinstance(twin, Run) else twin or []
    noisy = [dict(_values(one)) for one in twins]
    assert right.keys() == judged.keys(), right.keys() ^ judged.keys()
    scales: dict[str, float] = {}
    for name, value in right.items():
        kind = name.rsplit("/", 1)[-1]
        scales[kind] = max(scales.get(kind, 0.0), _largest(value))
    for name, value in right.items():
        assert value.dtype == judged[name].dtype and value.shape == judged[name].shape, name
        # A tensor far below its kind's scale consists of rounding alone.
        scale = max(_largest(value), 1e-3 * scales[name.rsplit("/", 1)[-1]], 1e-30)
        difference = _largest(value.double() - judged[name].double()) / scale
        tolerance = float64_tolerance
        if noisy:
            noise = max(_largest(value.double() - one[name].double()) for one in noisy) / scale
            tolerance = max(TWIN_FACTOR * noise, floor)
        assert difference <= tolerance, f"{name}: relative difference {difference:.3g} > {tolerance:.3g}"


def _twins(make, loop, batches) -> list[Run]:
    """Eager runs that round otherwise: torch adds in another order with other numbers of threads."""
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in {1, 2, 3} - {threads}:
            torch.set_num_threads(count)
            runs.append(train(make, loop, _clone(batches), compiled=False))
    finally:
        torch.set_num_threads(threads)
    return runs


def _values(run: Run) -> Iterator[tuple[str, torch.Tensor]]:
    yield "observed", torch.tensor(run.observed, dtype=torch.float64)
    for name, item in run.objects.items():
        if isinstance(item, torch.nn.Module):
            kinds = {key: "parameter" for key, _ in item.named_parameters()}
            for key, tensor in item.state_dict().items():
                yield f"{name}.{key}/{kinds.get(key, 'buffer')}", tensor.detach().clone()
        elif isinstance(item, torch.optim.Optimizer):
            for index, state in item.state_dict()["state"].items():
                for key, value in state.items():
                    if isinstance(value, torch.Tensor):
                        yield f"{name}.{index}/{key}", value.detach().clone()


def _largest(tensor: torch.Tensor) -> float:
    return tensor.detach().double().abs().max().item() if tensor.numel() else 0.0


def _converted(data: Any, dtype: torch.dtype) -> Any:
    return _map(lambda t: t.to(dtype) if t.is_floating_point() else t, data)


def _clone(data: Any) -> Any:
    return _map(torch.clone, data)


def _map(function, data: Any) -> Any:
    if isinstance(data, torch.Tensor):
        return function(data)
    if isinstance(data, dict):
        return {key: _map(function, value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return type(data)(_map(function, item) for item in data)
    return data
