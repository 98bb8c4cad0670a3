"""How far a loop runs ahead of a GPU, and what it hears of it late."""

import time
from collections import deque
from typing import Any

import jax

from trainingcompiler.errors import TrainingCompilerError
from trainingcompiler.reporting.statistics import current as statistics

_AHEAD = 2  # programs: one computes, and the next is there when it ends


class DispatchQueue:
    """Programs that have been launched and not been looked at since.

    On a CPU a program is waited for. On a GPU the loop goes on while it computes, as it does in torch; without an end
    to it, the batches of steps that have not begun would fill the memory.
    """

    def __init__(self) -> None:
        self._launched: deque[tuple[Any, Any, Any, str | None]] = deque()

    def launched(self, inputs: Any, results: Any, holds: jax.Array | None, where: str | None) -> None:
        """Notes a program, and waits for the one before the last.

        Args:
            inputs: What it reads. It is kept until the program has ended: torch gives the memory of a tensor that is
                gone to the next one, and knows nothing of who else reads it.
            results: Arrays that it computes; one of them is kept, and may be donated meanwhile.
            holds: Whether its values were in range, if it asks; where they were not, it has left the state as it was.
            where: The script's line.

        Raises:
            TrainingCompilerError: A value was out of range in one before.
        """
        outputs = jax.tree.leaves(results)
        self._launched.append((inputs, outputs[-1:], holds, where))
        while len(self._launched) > _AHEAD:
            self._look()

    def settle(self) -> None:
        """Waits for all.

        Raises:
            TrainingCompilerError: A value was out of range.
        """
        while self._launched:
            self._look()

    def _look(self) -> None:
        started_s = time.perf_counter()
        try:
            self._wait_for_one()
        finally:
            statistics().waited_s += time.perf_counter() - started_s

    def _wait_for_one(self) -> None:
        _, kept, holds, where = self._launched.popleft()
        if holds is None:
            for array in kept:
                if not array.is_deleted():  # donated to a later program, which waits for it itself
                    array.block_until_ready()
        elif not holds:
            self._launched.clear()
            raise TrainingCompilerError(
                f"a value was out of range, such as an index, in the step at {where}, which left the model as it was; "
                "up to two steps after it have been made since, as a GPU computes behind the script. With "
                "--engine=eager PyTorch says which value it is"
            )
