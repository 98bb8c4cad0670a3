"""Workers that divide their state say what they have come for, before they do anything together.

Each holds a part of every array, so a worker that wants to see one needs all the others, and only one may want to
(`if rank == 0: torch.save(model.state_dict(), path)`). The others are on their way to the next step, or to a barrier.
There, all learn what each has come for; where one wants arrays, all hand over their parts, and ask again.
"""

import atexit
import enum
import functools
import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from trainingcompiler.errors import TrainingCompilerError
from trainingcompiler.parallel import spmd
from trainingcompiler.parallel.arrays import placed_array
from trainingcompiler.processes import rendezvous


class Occasion(enum.IntEnum):
    """What a worker has come for: a program, a function of `torch.distributed`, arrays; or it leaves."""

    RUN = 1
    TALK = 2
    FETCH = 3
    LEAVE = 4


class Lockstep:
    """Every worker's errands, in the order in which all come to them.

    It begins with the first `run`: before that, nothing is divided.

    Args:
        hand_over: Called on all workers at the same time, with the numbers of the arrays that somebody wants, and of
            those among them that this worker wants.
    """

    def __init__(self, hand_over: Callable[[Sequence[int], Sequence[int]], None]):
        self._hand_over = hand_over
        self._turn = threading.RLock()  # a thread of the script may look while another one trains
        self._count = 0
        self._process = os.getpid()

    def run(self, what: str) -> None:
        """Waits until all have come to the same program.

        Raises:
            TrainingCompilerError: Somebody has come for something else, or is gone.
        """
        if not self._count:
            atexit.register(self._leave)
        self._together(Occasion.RUN, what)

    def talk(self, what: str, details: str = "") -> None:
        """Waits until all have come to the same function of `torch.distributed`, in which they would wait anyway.

        Args:
            what: The same for all.
            details: What else those are told who have come for something else.

        Raises:
            TrainingCompilerError: As `run`.
        """
        if self._count:
            self._together(Occasion.TALK, what, details=details)

    def fetch(self, numbers: Sequence[int], what: str) -> None:
        """Waits until all have come to something, and has them hand over arrays.

        Raises:
            TrainingCompilerError: Somebody has left, or is gone.
        """
        self._together(Occasion.FETCH, what, numbers)

    def _leave(self) -> None:
        """Stays for as long as others may still want arrays."""
        if os.getpid() != self._process or rendezvous.leaves_alone():
            return
        try:
            self._together(Occasion.LEAVE, "the end of its script")
        except TrainingCompilerError as error:  # what has failed elsewhere is told there; this script has ended well
            sys.stderr.write(f"trainingcompiler: {error}\n")

    def _together(self, occasion: Occasion, what: str, numbers: Sequence[int] = (), details: str = "") -> None:
        with self._turn:
            while True:
                self._count += 1
                digest = hashlib.sha256(f"{what} {list(numbers)}".encode()).digest()
                told = self._told(occasion, int.from_bytes(digest[:8], signed=True))
                if (told == told[0]).all():
                    if occasion is Occasion.FETCH:
                        self._hand_over(numbers, numbers)
                    return
                mine = {"what": f"{what}: {details}" if details else what, "numbers": list(numbers)}
                everyone = spmd.share(f"roll call {self._count}", mine)
                wanted = {number for other in everyone for number in other["numbers"]}
                if not wanted:
                    if occasion is Occasion.LEAVE:
                        return
                    raise _disagreement(everyone)
                self._hand_over(sorted(wanted), numbers)
                if occasion is Occasion.FETCH:
                    return

    def _told(self, occasion: Occasion, digest: int) -> np.ndarray:
        """Int64[workers, 2]: the errand and the digest of each."""
        values = placed_array(np.array([occasion, digest], np.int64), spmd.own())
        try:
            with jax.enable_x64(True):
                return np.asarray(_exchange()(values).addressable_data(0))
        except jax.errors.JaxRuntimeError as error:
            time.sleep(spmd.AFTER_OTHERS_S)
            raise TrainingCompilerError(
                f"a worker that the others wait for is gone: {str(error).splitlines()[0]}"
            ) from None


@functools.cache
def _exchange() -> Callable[[jax.Array], jax.Array]:
    return jax.jit(spmd.each(lambda values: lax.all_gather(values, spmd.AXIS)))


def _disagreement(everyone: list[dict[str, Any]]) -> TrainingCompilerError:
    lines = "".join(f"\n  rank {rank}  {other['what']}" for rank, other in enumerate(everyone))
    return TrainingCompilerError(
        f"workers that divide the state have to come to the same, and have come to:{lines}\n"
        "All ranks run every step, with batches of the same shape (DistributedSampler pads the last one, or "
        "DataLoader(..., drop_last=True) leaves it out). A rank alone may look at values (state_dict(), loss.item()), "
        "and not at what is averaged over the workers, such as a gradient or its norm"
    )
