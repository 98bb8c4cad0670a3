"""Checkpoints of a training state that is too large for one file: each device writes its part, in the background.

Written by Orbax (https://orbax.readthedocs.io): a step's folder has another name until all of it is there, so that one
that was cut off is never taken for whole. Only files of plain values are read back; nothing of them is run.
"""

import atexit
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainingcompiler.errors import TrainingCompilerError, UsageError
from trainingcompiler.frameworks.pytorch.interop.arrays import numpy_view
from trainingcompiler.frameworks.pytorch.state.offloaded import array_of

_REST = "rest"  # whatever of the state is not a tensor, and its structure


class Checkpoints:
    """A folder of checkpoints, each of a training step.

    What is divided between devices, or between workers (`--strategy fsdp`), is written by whoever holds it, without
    being gathered; everything else by rank 0. All workers call `save`, or, where nothing is divided between them, rank
    0 alone may. A checkpoint resumes on any number of devices and of workers, with any strategy, and without
    trainingcompiler's steps.

    Args:
        folder: Where they are kept; shared by all hosts.
        keep: How many; older ones are removed when a new one is complete.
        parts: What is saved, by name: anything with `state_dict()` and `load_state_dict()`, such as a model, an
            optimizer, a scheduler. A model's wrapper (`DistributedDataParallel`) is left out, so that the names are
            those of the model itself.

    Raises:
        UsageError: Orbax is not installed; there is nothing to save, or something that has no state.

    Example:
        >>> checkpoints = tc.Checkpoints("checkpoints", model=model, optimizer=optimizer, schedule=schedule)
        >>> for step in range(checkpoints.restore(), 10_000):
        ...     train(step)
        ...     if (step + 1) % 500 == 0:
        ...         checkpoints.save(step + 1)  # goes on at once
        >>> checkpoints.close()
    """

    def __init__(self, folder: str | os.PathLike, /, *, keep: int = 2, **parts: Any):
        self._parts = {name: _unwrapped(part) for name, part in parts.items()}
        _check(self._parts, keep)
        self._folder = Path(folder).absolute()
        self._keep = keep
        self._manager: Any = None
        atexit.register(self.close)  # what is being written is finished

    def restore(self) -> int:
        """Loads the newest complete checkpoint into the parts.

        Returns:
            The step that it was saved with; 0, and nothing is loaded, if there is none.

        Raises:
            TrainingCompilerError: It was saved with other parts.
        """
        manager = self._managed()
        manager.wait_until_finished()
        manager.reload()  # another worker may have written
        step = manager.latest_step()
        if step is None:
            return 0
        ocp = _orbax()
        names = manager.item_metadata(step).tree
        wanted = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
        arrays = manager.restore(step, args=ocp.args.PyTreeRestore(restore_args=wanted))
        structure = torch.load(io.BytesIO(arrays[_REST].tobytes()), weights_only=True)
        saved, here = set(structure), set(self._parts)
        if saved != here:
            raise TrainingCompilerError(
                f"the checkpoint {self._folder / str(step)} has {_listed(saved)}, and this script saves "
                f"{_listed(here)}: give Checkpoints the same, or another folder"
            )
        for name, part in self._parts.items():
            part.load_state_dict(_decoded(structure[name], arrays))
        return step

    def save(self, step: int) -> None:
        """Saves the state as it is now; training may go on at once.

        Args:
            step: What `restore` is to return: how many steps have been done.

        Raises:
            TrainingCompilerError: Only some of the workers that divide the state have come.
            UsageError: There is a newer checkpoint in the folder, or a state holds what cannot be read back safely.
            OSError, and what else Orbax raises: The last one could not be written, on a full disk, say.
        """
        session, sharded_state = _session(), _sharded_state()
        if session is not None:
            session.settle()
        if sharded_state is not None:
            sharded_state.lockstep.talk("Checkpoints.save")
        elif _rank():
            return
        manager = self._managed()
        newest = manager.latest_step()
        if newest is not None and newest >= step:
            raise UsageError(
                f"{self._folder} has a checkpoint of step {newest}, and step {step} is not newer: restore() before "
                "training goes on from there, or take another folder"
            )
        arrays: dict[str, Any] = {}
        structure = {name: _encoded(_state_of(part), name, arrays) for name, part in self._parts.items()}
        rest = io.BytesIO()
        torch.save(structure, rest)
        _check_readable(rest)
        arrays[_REST] = np.frombuffer(rest.getvalue(), np.uint8)
        manager.save(step, args=_orbax().args.PyTreeSave(arrays), force=True)

    def close(self) -> None:
        """Waits until everything is written.

        Raises:
            OSError, and what else Orbax raises: It could not be.
        """
        manager, self._manager = self._manager, None
        atexit.unregister(self.close)
        if manager is not None:
            manager.wait_until_finished()
            manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _managed(self) -> Any:
        """Orbax's manager: one of all workers if they divide the state, or else each worker's own."""
        if self._manager is None:
            ocp = _orbax()
            self._folder.mkdir(parents=True, exist_ok=True)
            alone = None if _sharded_state() is not None or jax.process_count() == 1 else jax.process_index()
            options = ocp.options.MultiprocessingOptions(
                primary_host=alone or 0,
                active_processes=None if alone is None else {alone},
                barrier_sync_key_prefix=None if alone is None else f"rank {alone}",
            )
            self._manager = ocp.CheckpointManager(
                self._folder,
                item_handlers=ocp.PyTreeCheckpointHandler(multiprocessing_options=options),
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=self._keep,
                    create=False,
                    multiprocessing_options=options,
                ),
            )
        return self._manager


def _check(parts: Mapping[str, Any], keep: int) -> None:
    _orbax()
    mistakes = []
    if not parts:
        mistakes.append("nothing to save: give it model=model, optimizer=optimizer")
    for name, part in parts.items():
        if not (hasattr(part, "state_dict") and hasattr(part, "load_state_dict")):
            mistakes.append(f"{name} is a {type(part).__name__}, which has no state_dict() and load_state_dict()")
    if keep < 1:
        mistakes.append(f"keep={keep}: must be 1 or more")
    if mistakes:
        raise UsageError("Checkpoints: " + "; ".join(mistakes))


def _orbax() -> Any:
    try:
        import orbax.checkpoint
    except ImportError:
        raise UsageError(
            'Checkpoints are written by Orbax, which is not installed: pip install "trainingcompiler[checkpoints]"'
        ) from None
    return orbax.checkpoint


def _session() -> Any:
    from trainingcompiler.frameworks import pytorch

    return pytorch.current_session()


def _sharded_state() -> Any:
    """How workers divide the state; None where they do not."""
    session = _session()
    return None if session is None else session.programs.sharded_state


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _unwrapped(part: Any) -> Any:
    return part.module if isinstance(part, DistributedDataParallel) else part


def _state_of(part: Any) -> Any:
    """The state, whose tensors are left where they are."""
    return part.state_dict(keep_vars=True) if isinstance(part, nn.Module) else part.state_dict()


def _encoded(value: Any, name: str, arrays: dict[str, Any]) -> Any:
    """The structure of a state, in which its tensors are names; their values go to `arrays`."""
    if isinstance(value, torch.Tensor):
        if not value.numel():  # Orbax does not write these
            return {"plain": value.detach()}
        arrays[name] = _snapshot(value)
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": [(key, _encoded(item, f"{name}.{key}", arrays)) for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [_encoded(item, f"{name}.{index}", arrays) for index, item in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": items}
    return {"plain": value}


def _decoded(value: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    ((kind, content),) = value.items()
    if kind == "tensor":
        return _tensor_of(arrays[content])
    if kind == "dict":
        return {key: _decoded(item, arrays) for key, item in content}
    if kind in ("list", "tuple"):
        return (list if kind == "list" else tuple)(_decoded(item, arrays) for item in content)
    return content


def _snapshot(tensor: torch.Tensor) -> Any:
    """The values as they are now, whatever the next step makes of their memory."""
    array = array_of(tensor)
    if array is None:
        return numpy_view(tensor.detach().cpu()).copy()
    if array.sharding.is_fully_replicated:  # of workers, each has its own, and rank 0's is saved
        return np.array(array.addressable_data(0), copy=True)
    with jax.enable_x64(True):
        return array.copy()


def _tensor_of(array: np.ndarray) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _check_readable(saved: io.BytesIO) -> None:
    try:
        torch.load(io.BytesIO(saved.getvalue()), weights_only=True)
    except Exception as error:
        raise UsageError(
            f"a state holds what cannot be read back safely ({str(error).splitlines()[0]}); Checkpoints keeps tensors, "
            "numbers, text, and lists and dicts of them"
        ) from None


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names))
