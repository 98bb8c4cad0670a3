"""A script of several processes keeps its meaning: each worker's batch, loss and buffers are its own, and gradients are
averaged where `DistributedDataParallel` averages them.

A call of the wrapper is recorded as a call of the module inside, and after the backward comes an entry of our own that
averages; in a compiled step that is XLA's all-reduce. Whatever else workers say to each other (metrics, buffers,
barriers) goes through `torch.distributed` at once, in the order of the script, so that a worker that looks at a value
which the others do not look at runs no program that waits for them.
"""

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainingcompiler.errors import CaptureError
from trainingcompiler.frameworks.pytorch.interop.dynamo import as_written
from trainingcompiler.frameworks.pytorch.interop.passthrough import passthrough
from trainingcompiler.frameworks.pytorch.interop.pytree import flatten
from trainingcompiler.frameworks.pytorch.interop.source_lines import user_line
from trainingcompiler.frameworks.pytorch.state.offloaded import bring_back
from trainingcompiler.frameworks.pytorch.tape.deferred_tensor import DeferredTensor
from trainingcompiler.frameworks.pytorch.tape.entries import Entry, Slot
from trainingcompiler.frameworks.pytorch.tape.tape import Tape
from trainingcompiler.processes import rendezvous

if TYPE_CHECKING:
    from trainingcompiler.frameworks.pytorch.session.session import Session

# A message for each gradient costs a small GPT a third of its speed on two CPU workers; one of 15 MB, or torch's 25 MB,
# costs a multilayer perceptron more than half of it (benchmarks/workers.py). On a GPU, XLA combines them further.
_BUCKET_BYTES = 2**20

TALKING = (
    "all_gather all_gather_into_tensor all_reduce all_to_all all_to_all_single broadcast gather reduce reduce_scatter "
    "reduce_scatter_tensor scatter send isend recv irecv"
).split()
"""Functions of `torch.distributed` that take tensors, which have to be there."""
WAITING = "all_gather_object barrier broadcast_object_list gather_object monitored_barrier scatter_object_list".split()
"""Others, in which all workers wait for each other."""
_OF_FEW = frozenset("send isend recv irecv".split())


def world_size() -> int:
    """How many workers train together."""
    worker = rendezvous.current()
    return 1 if worker is None else worker.world_size


# `torch.library.custom_op` looks for the source of its caller in all modules: 30 ms an operator, in every process.
_OPERATORS = torch.library.Library("trainingcompiler", "DEF")
_OPERATORS.define("sum_over_workers(Tensor x) -> Tensor")
_OPERATORS.define("mean_over_workers(Tensor[] tensors, int count) -> Tensor[]")
sum_over_workers = torch.ops.trainingcompiler.sum_over_workers
"""The sum of every worker's tensor of the same shape."""
mean_over_workers = torch.ops.trainingcompiler.mean_over_workers
"""The means of every worker's tensors of one dtype, sent together."""


@torch.library.impl(_OPERATORS, "sum_over_workers", "CompositeExplicitAutograd")
def _sum_in_torch(x: torch.Tensor) -> torch.Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


@torch.library.impl(_OPERATORS, "sum_over_workers", "Meta")
def _sum_of_fakes(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# Each worker's result depends on all workers' tensors alike.
torch.library.register_autograd(
    "trainingcompiler::sum_over_workers", lambda context, gradient: sum_over_workers(gradient), lib=_OPERATORS
)


@torch.library.impl(_OPERATORS, "mean_over_workers", "CompositeExplicitAutograd")
def _mean_in_torch(tensors: list[torch.Tensor], count: int) -> list[torch.Tensor]:
    flat = torch.cat([tensor.flatten() for tensor in tensors]).div_(count)
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.clone().view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


@torch.library.impl(_OPERATORS, "mean_over_workers", "Meta")
def _means_of_fakes(tensors: list[torch.Tensor], count: int) -> list[torch.Tensor]:
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Replaces the gradients of parameters by their means over the workers.

    Small ones travel together; the last layers' come first, as backward has them first.
    """
    count = world_size()
    with torch.no_grad():
        for bucket in _buckets([p.grad for p in reversed(parameters) if p.grad is not None]):
            for gradient, mean in zip(bucket, mean_over_workers(bucket, count), strict=True):
                gradient.copy_(mean)


def _buckets(gradients: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Neighbours of one dtype, each bucket closed when it is large enough."""
    buckets: list[list[torch.Tensor]] = []
    filled = 0
    for gradient in gradients:
        if not buckets or buckets[-1][0].dtype != gradient.dtype or filled > _BUCKET_BYTES:
            buckets.append([])
            filled = 0
        buckets[-1].append(gradient)
        filled += gradient.numel() * gradient.element_size()
    return buckets


class DdpHandler:
    """What a session does for a script of several processes.

    Args:
        session: Whose calls of `DistributedDataParallel` these are.
    """

    def __init__(self, session: "Session"):
        self._session = session
        self._synchronized: dict[int, DistributedDataParallel] = {}  # called since the last backward
        self._wrapped: set[int] = set()  # the wrappers that were called, and the modules inside, by identity

    def call(self, original: Callable, wrapper: DistributedDataParallel, args: tuple, kwargs: dict) -> Any:
        """Does what calling the wrapper does: the module inside is recorded, or torch runs the wrapper."""
        session = self._session
        module = as_written(wrapper.module)
        self._wrapped |= {id(wrapper), id(module)}
        reason = obstacle(wrapper)
        if reason is not None and not session.fallbacks.covers(wrapper):
            session.fallbacks.leave(CaptureError(reason, user_line()), [wrapper])
        if reason is not None or not session.module_calls.is_deferrable(module, args, kwargs):
            session.backward_compiled &= not torch.is_grad_enabled()
            session.module_calls.keep_history(type(module).__name__, args, kwargs)
            with passthrough(), session.torch_compile.in_torch(module):
                self._give_back(module)
                kwargs = {name: session.module_calls.real_arguments(value) for name, value in kwargs.items()}
                return original(wrapper, *session.module_calls.real_arguments(args), **kwargs)
        if session.has_backward:
            session.commit()
        if session.programs.sharded_state is not None:
            session.programs.sharded_state.share(_averaged(wrapper))
        self._share_buffers(wrapper)
        synchronizes = torch.is_grad_enabled() and wrapper.require_backward_grad_sync
        wrapper.require_forward_param_sync = synchronizes
        result = session.module_calls.call(original, module, args, kwargs)
        if synchronizes:
            self._synchronized[id(wrapper)] = wrapper
        return result

    def _give_back(self, module: nn.Module) -> None:
        """Lets the wrapper's own code, in C++, find the values of its tensors."""
        sharded_state = self._session.programs.sharded_state
        if sharded_state is not None:
            sharded_state.bring_back([*module.parameters(), *module.buffers()], "PyTorch, which runs this step")

    def may_be_looked_at(self, tape: Tape, slot: Slot) -> bool:
        """Whether a value can, and has to, be computed apart from averaging that all workers do together.

        `if rank == 0: print(loss.item())` between `backward()` and `step()` must not end rank 0's program there, while
        the others' goes on to the step. The look costs the forward once more.
        """
        return self._averages(tape.entries) and not self._averages(tape.slice_for([slot]))

    @staticmethod
    def _averages(entries: Iterable[Entry]) -> bool:
        return any(entry.function is average_gradients for entry in entries)

    def after_backward(self) -> None:
        """Averages the gradients that wrappers are to average."""
        wrappers, self._synchronized = list(self._synchronized.values()), {}
        for wrapper in wrappers:
            parameters = [parameter for parameter in _averaged(wrapper) if parameter.requires_grad]
            # Recorded as clipping is: a call on all gradients, between backward and step.
            self._session.stepping.clip(average_gradients, (parameters,), {})

    def _share_buffers(self, wrapper: Any) -> None:
        """Gives every worker rank 0's buffers, as torch does before each forward that follows a training one."""
        if wrapper.will_sync_module_buffers():
            self._session.settle()
            self.come_to("the buffers of DistributedDataParallel")
            with passthrough():
                bring_back([*wrapper.modules_buffers])
                wrapper._sync_buffers()

    def left_to_torch(self, error: CaptureError, items: list[Any]) -> None:
        """Tells the others, which may be waiting for this worker in a compiled step, that torch runs it here."""
        programs = self._session.programs
        if not torch.is_grad_enabled() or self._wrapped.isdisjoint(map(id, items)):
            return
        if programs.sharded_state is None:
            programs.agreement.leave(error.reason)
        else:
            programs.sharded_state.lockstep.talk("PyTorch, to which it has left a step", error.reason)

    def come_to(self, what: str) -> None:
        """Waits until all workers have come to the same talk, where one of them may be looking at divided state."""
        if self._session.programs.sharded_state is not None:
            self._session.programs.sharded_state.lockstep.talk(what)


def _averaged(wrapper: DistributedDataParallel) -> list[nn.Parameter]:
    """The parameters that a wrapper keeps the same on all workers."""
    return [p for name, p in wrapper.module.named_parameters() if name not in wrapper.parameters_to_ignore]


def _is_of_all(argument: Any) -> bool:
    is_group = isinstance(argument, dist.ProcessGroup)
    return not is_group or dist.get_world_size(argument) == world_size()


def obstacle(wrapper: Any) -> str | None:
    """Why a wrapper's averaging is left to torch."""
    if wrapper.process_group is not None and dist.get_world_size(wrapper.process_group) != world_size():
        return "DistributedDataParallel averages within a group of the workers"
    if getattr(wrapper, "_comm_hooks", None):
        return "DistributedDataParallel has a communication hook"
    if getattr(wrapper, "mixed_precision", None) is not None:
        return "DistributedDataParallel has a mixed precision of its own"
    if wrapper._join_config.enable:
        return "DistributedDataParallel joins workers with different numbers of batches"
    if wrapper._forward_hooks or wrapper._forward_pre_hooks or wrapper._backward_hooks:
        return "DistributedDataParallel has a hook"
    return None


def averages_unseen(wrapper: DistributedDataParallel) -> bool:
    """Whether a wrapper averages over workers that we do not know of."""
    return dist.is_initialized() and dist.get_world_size(wrapper.process_group) > 1


def not_joined() -> CaptureError:
    """Why such a wrapper is left to torch."""
    return CaptureError(
        "DistributedDataParallel averages over processes that trainingcompiler was not started with; start them with "
        "python -m trainingcompiler.launch --nproc-per-node=N train.py",
        user_line(),
    )


class DistributedPatches:
    """`torch.distributed`, which gets the values of tensors that a loop holds and nobody has computed."""

    def __init__(self, session: "Session"):
        self._session = session

    def hooked(self, original: Callable) -> Callable:
        """The function, given real tensors, when no worker waits for another's part of the state."""
        workers = self._session.workers

        @functools.wraps(original)
        def talk(*args: Any, **kwargs: Any) -> Any:
            leaves, _ = flatten((args, kwargs))
            for leaf in leaves:
                if isinstance(leaf, DeferredTensor):
                    self._settle(leaf)
            if workers is not None and original.__name__ not in _OF_FEW and all(map(_is_of_all, leaves)):
                workers.come_to(original.__name__)
            bring_back(leaves)
            return original(*self._session.real(args), **self._session.real(kwargs))

        return talk

    def _settle(self, tensor: DeferredTensor) -> None:
        """Makes a deferred tensor one that has a value for good, which others may write to."""
        value = self._session.value(tensor.slot)
        if not isinstance(tensor, DeferredTensor):  # it has become the real tensor
            return
        if not tensor.slot.committed:
            slot = Slot(tensor.slot.meta, tensor.slot.device)
            slot.value, slot.committed = value.detach().clone(), True
            tensor.slot = slot


def synchronized_batch_norm(original: Callable) -> Callable:
    """`nn.SyncBatchNorm.forward`, in operators that a compiled step has, and that torch has on a CPU too.

    Args:
        original: torch's own, for what is left to it.
    """

    @functools.wraps(original)
    def forward(module: nn.SyncBatchNorm, x: torch.Tensor) -> torch.Tensor:
        group = module.process_group
        alone = world_size() == 1 or not dist.is_initialized() or not module.training
        if alone or (group is not None and dist.get_world_size(group) != world_size()):
            return nn.BatchNorm2d.forward(module, x) if alone and x.device.type == "cpu" else original(module, x)
        dims = [0, *range(2, x.ndim)]
        of_channel = (1, -1, *[1] * (x.ndim - 2))
        count = sum_over_workers(torch.full((), x.numel() / x.shape[1], dtype=x.dtype))
        mean = sum_over_workers(x.sum(dims)) / count
        centered = x - mean.view(of_channel)
        variance = sum_over_workers(centered.square().sum(dims)) / count
        if module.track_running_stats:
            _track(module, mean.detach(), (variance * (count / (count - 1))).detach())
        result = centered * torch.rsqrt(variance + module.eps).view(of_channel)
        if module.affine:
            result = result * module.weight.view(of_channel) + module.bias.view(of_channel)
        return result

    return forward


def _track(module: Any, mean: torch.Tensor, variance: torch.Tensor) -> None:
    with torch.no_grad():
        module.num_batches_tracked.add_(1)
        factor: Any = module.momentum
        if factor is None:  # the mean over all batches so far
            factor = 1 / module.num_batches_tracked.to(mean.dtype)
        module.running_mean.copy_(module.running_mean * (1 - factor) + mean * factor)
        module.running_var.copy_(module.running_var * (1 - factor) + variance * factor)
