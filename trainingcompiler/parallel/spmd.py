"""One program for several processes, each with one device and numbers of its own.

A worker's arrays are its own, also where JAX is told that all hold the same ("replicated"), and what they share they
say with collectives, under `shard_map`. XLA takes no worker's word for another's: between the collectives, each
computes with what it has. Only under `--strategy fsdp`, and only what all would have alike, is divided between them.
"""

import contextlib
import functools
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trainingcompiler.errors import TrainingCompilerError
from trainingcompiler.parallel.sharding import dim_to_divide
from trainingcompiler.processes import rendezvous

AXIS = "workers"
OPERATORS = ("trainingcompiler.sum_over_workers.default", "trainingcompiler.mean_over_workers.default")
"""PyTorch's operators in which workers wait for each other, as graphs name them."""
WAIT_S = 600.0
"""How long a worker waits for the others to come to a new program."""
STUCK_S = 15.0
"""A step that has been running so long may be waiting for a worker that runs another one: they compare notes."""

_WHOLE = PartitionSpec()
AFTER_OTHERS_S = 3.0  # whoever has failed first is to be seen first: a broken connection is noticed at once


@functools.cache
def own() -> NamedSharding:
    """What JAX is told of every array of such a program."""
    return NamedSharding(Mesh(np.array(jax.devices()), (AXIS,)), PartitionSpec())


@functools.cache
def divided(shape: tuple[int, ...]) -> NamedSharding:
    """Where the parts of an array are that workers divide, which really is one; `own()` if it is too small to be."""
    mesh = own().mesh
    dim = dim_to_divide(shape, mesh.size)
    return own() if dim is None else NamedSharding(mesh, PartitionSpec(*[None] * dim, AXIS))


def each(function: Callable, results: Any = _WHOLE) -> Callable:
    """The function, run by every worker on its own arrays; it may use collectives over `AXIS`.

    Args:
        function: Given whole arrays, also where a step's state is divided.
        results: The partitions of what it returns, where it returns parts.
    """
    return jax.shard_map(function, mesh=own().mesh, in_specs=_WHOLE, out_specs=results, check_vma=False)


@functools.cache
def _gather() -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda array: array, out_shardings=own())


def gathered(array: jax.Array) -> jax.Array:
    """The whole of a divided array, on every worker; all have to ask at the same time."""
    with jax.enable_x64(True):
        return _gather()(array)


def share(key: str, value: Any) -> list[Any]:
    """Gives every worker's value to all, in order of rank; `key` must be new.

    Raises:
        TrainingCompilerError: Somebody does not come.
    """
    worker, client = rendezvous.current(), rendezvous.store()
    assert worker is not None
    client.key_value_set(f"trainingcompiler/{key}/{worker.rank}", json.dumps(value))
    found = []
    for rank in range(worker.world_size):
        text = _awaited(client, f"trainingcompiler/{key}/{rank}", rank, key)
        found.append(json.loads(text))
    return found


def _awaited(client: Any, key: str, rank: int, what: str) -> str:
    try:
        return client.blocking_key_value_get(key, int(WAIT_S * 1000))
    except jax.errors.JaxRuntimeError:
        raise TrainingCompilerError(
            f"rank {rank} has not come to {what} within {WAIT_S:.0f} s: its script has taken another way, or it is gone"
        ) from None


def _by_rank(client: Any, folder: str) -> dict[str, str]:
    return {key.rpartition("/")[2]: text for key, text in client.key_value_dir_get(folder)}


def _rank() -> int:
    worker = rendezvous.current()
    assert worker is not None
    return worker.rank


_meetings = itertools.count(1)  # of the process: a second session must not take a key of the first


class ProgramAgreement:
    """Sees that all workers run the same programs in the same order, where these wait for each other.

    A program's first run is agreed upon. A later one that lasts is looked into: workers that have come to different
    programs would wait for each other for ever.
    """

    def __init__(self):
        self._runs = 0
        self._doing = ""  # the program that this worker is in, with its line
        self._since = 0.0  # when it began; 0 outside
        self._watching = False
        self._left: set[str] = set()  # why this worker has left steps to its framework
        self._is_away = False  # since the last program that it ran

    def leave(self, reason: str) -> None:
        """Tells the others that the framework runs a step of this worker's, in which nobody of them may be."""
        self._left.add(reason)
        self._is_away = True
        rendezvous.store().key_value_set(f"trainingcompiler/left/{_rank()}", reason, allow_overwrite=True)

    def meet(self, name: str, where: str | None, inputs: list[str]) -> None:
        """Waits until every worker has come to the same new program.

        Args:
            name: The program's name.
            where: The script's line.
            inputs: What the program is given, in words.

        Raises:
            TrainingCompilerError: Somebody has come to another program, or with other shapes.
        """
        number = next(_meetings)
        with self._at(f"the first run of {name}", where):
            told = share(f"program {number}", {"name": name, "where": where, "inputs": inputs})
        for rank, other in enumerate(told):
            difference = _difference(told[0], other)
            if difference:
                raise TrainingCompilerError(
                    f"workers disagree on the program that they are to run together: {difference.format(rank=rank)}. "
                    "Each worker has to come to the same step with a batch of the same shape: DistributedSampler "
                    "pads the last one, or DataLoader(..., drop_last=True) leaves it out"
                )

    @contextlib.contextmanager
    def running(self, name: str, where: str | None) -> Iterator[None]:
        """Watches over one run of a program that waits for others.

        Raises:
            TrainingCompilerError: One of them is gone.
        """
        self._runs += 1
        try:
            with self._at(name, where):
                yield
        except jax.errors.JaxRuntimeError as error:
            time.sleep(AFTER_OTHERS_S)
            raise TrainingCompilerError(
                f"a worker that was waited for in {name}{f' at {where}' if where else ''} is gone: "
                f"{str(error).splitlines()[0]}"
            ) from None

    @contextlib.contextmanager
    def _at(self, what: str, where: str | None) -> Iterator[None]:
        if self._is_away:
            self._is_away = False
            rendezvous.store().key_value_delete(f"trainingcompiler/left/{_rank()}")
        self._doing, self._since = f"{what} at {where}" if where else what, time.monotonic()
        if not self._watching:
            self._watching = True
            threading.Thread(target=self._watch, name="trainingcompiler agreement", daemon=True).start()
        try:
            yield
        finally:
            self._since = 0.0

    def _watch(self) -> None:
        rank, client = _rank(), rendezvous.store()
        told = ""
        seen: dict[str, str] = {}
        seen_since = 0.0
        while True:
            time.sleep(1.0)
            since, doing = self._since, f"run {self._runs}: {self._doing}"
            if since and time.monotonic() - since > STUCK_S:
                if told != doing:
                    told = doing
                    client.key_value_set(f"trainingcompiler/stuck/{rank}", doing, allow_overwrite=True)
                others = _by_rank(client, "trainingcompiler/stuck/")
                for other, reason in _by_rank(client, "trainingcompiler/left/").items():
                    if reason not in self._left:
                        others[other] = f"has left the step to its framework: {reason}"
                if others != seen:
                    seen, seen_since = others, time.monotonic()
                # One may be at the end of a long step while another is in the next: that passes.
                lasts = time.monotonic() - seen_since > STUCK_S
                if self._since == since and lasts and len(set(others.values())) > 1:
                    _give_up(others)
            elif told:
                told = ""
                client.key_value_delete(f"trainingcompiler/stuck/{rank}")


def _give_up(doing: dict[str, str]) -> None:
    """Ends this process: its main thread waits, and nothing can wake it."""
    lines = "".join(f"\n  rank {rank}  {text}" for rank, text in sorted(doing.items()))
    sys.stderr.write(
        f"trainingcompiler: workers wait for each other in different programs, for {2 * STUCK_S:.0f} s:{lines}\n"
        "A part of the loop that only one rank takes may not run a step, read a gradient, or call a synchronized "
        "layer, which all ranks do together; and what one rank cannot compile, all have to leave: --engine=eager.\n"
    )
    sys.stderr.flush()
    os._exit(1)


def _difference(first: dict, other: dict) -> str:
    for key, what in (("name", "runs"), ("where", "is at")):
        if first[key] != other[key]:
            return f"rank 0 {what} {first[key]}, and rank {{rank}} {what} {other[key]}"
    for ours, theirs in zip(first["inputs"], other["inputs"], strict=False):
        if ours != theirs:
            return f"rank 0 has {ours}, and rank {{rank}} {theirs}, at {first['where']}"
    counts = len(first["inputs"]), len(other["inputs"])
    if counts[0] != counts[1]:
        return f"rank 0 has {counts[0]} inputs, and rank {{rank}} {counts[1]}, at {first['where']}"
    return ""
