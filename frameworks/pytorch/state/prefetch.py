"""Moves training state to where XLA updates it, while a step is captured and its program compiled or loaded.

For GPT-2 small that is 1.5 GB, and 0.8 s of one core in new memory, while capturing keeps another one busy.
"""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import torch

from trainingcompiler.frameworks.pytorch.state.shared_tensors import CellRegistry

_THREADS = 2  # a second one halves the time, and more would take cores from XLA's compiler


class Mover:
    """Copies and moves the tensors of cells on one device, in threads that end with the block.

    Args:
        cells: Of one process with one device; None moves nothing: state on several devices is placed by the step.

    Example:
        >>> with Mover(cells) as mover:
        ...     mover.copy(parameters)  # nothing changes for whoever looks at them
        ...     ...
        ...     mover.move(state)  # from here on they lie in XLA's buffers
        ...     mover.wait()
    """

    def __init__(self, cells: CellRegistry | None):
        self._cells = cells
        self._pool = ThreadPoolExecutor(_THREADS, "trainingcompiler state")
        self._copies: dict[Any, Future] = {}
        self._moves: list[Future] = []

    def copy(self, tensors: Iterable[torch.Tensor]) -> None:
        """Begins to copy values, for those of the tensors that are going to be moved, and not written to before.

        Until then they exist twice: before the step's temporaries do, which for a GPT take more than its parameters.
        """
        for tensor in tensors if self._cells is not None else ():
            cell = self._cells.cell(tensor)
            self._copies[cell] = self._pool.submit(cell.copy)

    def move(self, tensors: Iterable[torch.Tensor]) -> None:
        """Begins to move tensors that a step is to write to."""
        for tensor in tensors if self._cells is not None else ():
            self._moves.append(self._pool.submit(self._move, self._cells.cell(tensor)))

    def wait(self) -> None:
        """Returns when everything has been moved."""
        for moved in self._moves:
            moved.result()

    def _move(self, cell: Any) -> None:
        if cell in self._copies:
            self._copies[cell].result()  # it was asked for before, so that a thread is at it or has been
        cell.array(None, written=True)

    def __enter__(self) -> "Mover":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)
        for cell in self._copies:
            cell.forget_copy()
