"""Runs torch code on fake tensors: every real tensor that it meets is replaced by a recorded one, by identity.

Nothing is ever baked in: parameters, buffers, optimizer state, closed-over masks and module constants all reach torch
through Python calls, where a `TorchFunctionMode` swaps them. A real tensor that slips past the mode meets
`FakeTensorMode`, which refuses it.
"""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch._prims_common import ELEMENTWISE_TYPE_PROMOTION_KIND, elementwise_dtypes
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from trainingcompiler.errors import CaptureError
from trainingcompiler.frameworks.pytorch.capture.functional_recorder import FunctionalRecorder
from trainingcompiler.frameworks.pytorch.capture.rng import TracedRng
from trainingcompiler.frameworks.pytorch.capture.traced_float import ConcretizationError, TracedFloat, guarded_math
from trainingcompiler.frameworks.pytorch.interop import cuda_autocast, devices
from trainingcompiler.frameworks.pytorch.interop.dynamo import left_out
from trainingcompiler.frameworks.pytorch.interop.gradients import is_backward, real_gradient, stored_gradient
from trainingcompiler.frameworks.pytorch.interop.source_lines import user_line
from trainingcompiler.frameworks.pytorch.interop.tensor_attributes import is_in_place
from trainingcompiler.frameworks.pytorch.ops import recurrent

_FUSED_OPTIMIZERS = {
    torch._fused_adam_: ("aten._fused_adam.default", 5),
    torch._fused_adamw_: ("aten._fused_adamw.default", 5),
    torch._fused_sgd_: ("aten._fused_sgd.default", 3),
    torch._fused_adagrad_: ("aten._fused_adagrad.default", 4),
}
# Functions whose numbers a 0-d tensor can stand in for without changing the result's dtype.
_TAKES_TENSOR = frozenset(
    "add sub subtract rsub mul multiply div divide true_divide pow lerp addcmul addcdiv maximum minimum where fill "
    "clamp clamp_min clamp_max eq ne __radd__ __rsub__ __rmul__ __rdiv__ __rtruediv__ __rpow__ __pow__ __add__ __sub__ "
    "__mul__ __div__ __truediv__ __iadd__ __isub__ __imul__ __idiv__ __itruediv__".split()
)


class FakeTensors(TorchFunctionMode):
    """Swaps real tensors for fake, recorded ones while it is entered.

    Args:
        recorder: Who records what runs; None is a new `FunctionalRecorder`.

    Attributes:
        recorder: Likewise.
        device: Where the script's tensors are, in place of which the stand-ins are on the CPU.
        lifted: The real tensors met so far, in order.
        grad_flags: `requires_grad` of real tensors at the first recorded call that met them, by identity.
        reads_numbers: Whether `.item()` of a floating tensor gives a `TracedFloat`, as inside `optimizer.step()`.
    """

    def __init__(self, recorder: Any = None):
        super().__init__()
        self.recorder: Any = FunctionalRecorder() if recorder is None else recorder
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=False)
        self.device = devices.CPU
        self.lifted: list[torch.Tensor] = []
        self.reads_numbers = False
        self.grad_flags: dict[int, tuple[torch.Tensor, bool]] = {}
        self._generator = TracedRng(self.recorder)
        self._fakes: dict[int, torch.Tensor] = {}
        self._first_values: dict[int, int] = {}
        self._reals: dict[int, torch.Tensor] = {}

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Enters the modes under which torch code is recorded."""
        with (
            _without_log(),
            _without_mkldnn(),
            left_out(),
            torch.autograd.set_multithreading_enabled(False),
            guarded_math(),
            self._generator.installed(),
            devices.pretended(self, self.device),
            cuda_autocast.installed() if self.device.type == "cuda" else contextlib.nullcontext(),
            self.fake_mode,
            self.recorder,
            self,
        ):
            yield

    @contextlib.contextmanager
    def numbers_in_steps(self) -> Iterator[None]:
        """Gives numbers to optimizers that ask for `.item()`, as those that count their steps in a tensor do."""

        def switch(on: bool):
            def hook(*_):
                self.reads_numbers = on

            return hook

        before = register_optimizer_step_pre_hook(switch(True))
        after = register_optimizer_step_post_hook(switch(False))
        try:
            yield
        finally:
            before.remove()
            after.remove()

    def fake_like(self, shape, dtype, stride=None, requires_grad=False) -> torch.Tensor:
        """A new recorded input of the graph."""
        with _disable_current_modes(), self.fake_mode:
            if stride is None:
                fake = torch.empty(shape, dtype=dtype)
            else:
                fake = torch.empty_strided(shape, stride, dtype=dtype)
            if requires_grad:
                fake.requires_grad_()
        self.recorder.add_input(fake)
        return fake

    def fake(self, real: torch.Tensor) -> torch.Tensor:
        """The stand-in of a real tensor, made on first use."""
        if isinstance(real, FakeTensor):
            return real
        known = self._fakes.get(id(real))
        if known is not None:
            return known
        self._check_liftable(real)
        _, requires_grad = self.grad_flags.get(id(real), (real, real.requires_grad))
        fake = self.fake_like(tuple(real.shape), real.dtype, real.stride(), requires_grad)
        self.lifted.append(real)
        self._first_values[id(real)] = self.recorder.value_of(fake)
        self._fakes[id(real)] = fake
        self._reals[id(fake)] = real
        gradient = real_gradient(real) if real.is_leaf else None
        if gradient is not None:
            fake_gradient = self.fake(gradient)
            with torch._C.DisableTorchFunction():
                fake.grad = fake_gradient
        return fake

    def stand_in(self, real: torch.Tensor, fake: torch.Tensor | None) -> None:
        """Makes `fake` the twin of a real tensor for a while; None ends it."""
        if fake is None:
            del self._fakes[id(real)]
        else:
            self._fakes[id(real)] = fake

    def first_value(self, real: torch.Tensor) -> int:
        """The number of the graph input that a real tensor became."""
        return self._first_values[id(real)]

    def let_go(self) -> None:
        """Drops every reference to a real tensor."""
        self.lifted, self._reals = [], {}

    def gradient(self, real: torch.Tensor) -> torch.Tensor | None:
        """What `.grad` of the real tensor's twin is now."""
        with torch._C.DisableTorchFunction():
            return stored_gradient(self._fakes[id(real)])

    def has_gradient(self, real: torch.Tensor) -> bool:
        """Whether a real tensor has a gradient at this point of the recording."""
        if id(real) in self._fakes:
            return self.gradient(real) is not None
        return real_gradient(real) is not None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        args, kwargs = self._swap(args), {name: self._swap(value) for name, value in kwargs.items()}
        if self.device.type != "cpu":
            name = _asked_of(func)
            if devices.is_shown(name):
                return devices.shown(name, self.device)
            if name == "cuda":
                return self._real(args[0])
            args, kwargs = devices.on_cpu(func, args, kwargs)
        if func in _FUSED_OPTIMIZERS:
            return self._fused(func, args, kwargs)
        name = getattr(func, "__name__", "")
        if name == "__set__" and getattr(getattr(func, "__self__", None), "__name__", "") == "data":
            raise CaptureError("a tensor's memory is replaced inside of the step (p.data = ...)", user_line())
        if name in ("item", "__float__") and self.reads_numbers and args[0].is_floating_point():
            return TracedFloat(float("nan"), args[0].detach().to(torch.float64))
        numbers = _numbers(args) + _numbers(tuple(kwargs.values()))
        if numbers:
            return self._real(self._with_numbers(func, name, args, kwargs, numbers))
        try:
            if is_backward(func):
                with self:  # Python runs inside: checkpointed blocks, custom functions
                    return _backward(*args, **kwargs)
            if recurrent.is_taken(func, args):
                return recurrent.run(func, args)
            return self._real(func(*args, **kwargs))
        except DynamicOutputShapeException as error:
            raise CaptureError(
                reason=f"the shape of a result depends on values ({error.func})",
                where=user_line(),
                operator=str(error.func),
            ) from None
        except DataDependentOutputException as error:
            raise CaptureError(
                reason=f"the step asks for the value of a tensor while it is being captured ({error.func})",
                where=user_line(),
                operator=str(error.func),
            ) from None

    def _with_numbers(self, func, name, args, kwargs, numbers):
        """A call with traced numbers among its arguments, in calls that take tensors in their places."""
        if name.startswith("_foreach_"):
            return self._foreach(func, name, args, kwargs, numbers)
        in_place = is_in_place(name)
        plain = name if name.startswith("__") else name.removesuffix("_")
        if plain not in _TAKES_TENSOR:
            raise ConcretizationError(numbers[0].source)
        first = next(argument for argument in args if isinstance(argument, torch.Tensor))
        if plain.startswith("clamp"):
            return self._clamped(plain, in_place, *args, **kwargs)
        expected = torch.bool if plain in ("eq", "ne") else _result_dtype(plain, args)
        if kwargs.get("value") is not None and plain in ("addcdiv", "addcmul"):
            func, args = (torch.Tensor.add_ if in_place else torch.add), (args[0], _product(plain, *args[1:]))
            kwargs = {"alpha": kwargs["value"]}
        alpha = kwargs.pop("alpha", None)
        if alpha is not None:
            first_two = [*args[:2]]
            scaled = 0 if plain == "rsub" else 1  # which of the two alpha multiplies
            first_two[scaled] = self._scaled(args[scaled], alpha, expected)
            args = (*first_two, *args[2:])
        args = tuple(_as_tensor(argument) for argument in args)
        kwargs = {key: _as_tensor(value) for key, value in kwargs.items()}
        if plain == "lerp":
            args = (*args[:2], args[2].to(first.dtype))
        result = func(*args, **kwargs)
        # A 0-d tensor in a number's place may widen the result's dtype, which a number never does.
        return result if in_place or result.dtype is expected else result.to(expected)

    @staticmethod
    def _clamped(plain, in_place, tensor, *limits, **named):
        """`clamp`, whose limits torch would read on the host if they came as 0-d tensors."""
        names = {"clamp_min": ("min",), "clamp_max": ("max",)}.get(plain, ("min", "max"))
        given = {**dict(zip(names, limits, strict=False)), **named}
        dtype = tensor.dtype if in_place else _result_dtype(plain, (tensor, *given.values()))
        result = tensor.to(dtype)
        for name, function in (("min", torch.maximum), ("max", torch.minimum)):  # in this order: `max` wins
            limit = given.get(name)
            if limit is not None:
                limit = limit.tensor if isinstance(limit, TracedFloat) else torch.as_tensor(limit)
                result = function(result, limit.to(dtype))
        return tensor.copy_(result) if in_place else result

    @staticmethod
    def _scaled(tensor: torch.Tensor, factor: float, dtype: torch.dtype) -> torch.Tensor:
        """A tensor times a number, in the dtype of what it is added to, which may be wider than its own."""
        return (tensor.to(dtype) * _as_tensor(factor)).to(dtype)

    def _foreach(self, func, name, args, kwargs, numbers):
        single = getattr(torch.Tensor, name.removeprefix("_foreach_"), None)
        if single is None:
            raise ConcretizationError(numbers[0].source)
        count = len(args[0])
        rows = [[a[i] if isinstance(a, list | tuple) else a for a in args] for i in range(count)]
        return [
            self.__torch_function__(
                single, (), tuple(row), {k: v[i] if isinstance(v, list | tuple) else v for k, v in kwargs.items()}
            )
            for i, row in enumerate(rows)
        ]

    def _fused(self, func, args, kwargs):
        operator, lists = _FUSED_OPTIMIZERS[func]
        kwargs = {key: _as_tensor(value) for key, value in kwargs.items()}
        outputs = [tensor for argument in args[:lists] for tensor in argument]
        self.recorder.emit(operator, args, kwargs, outputs)

    def _swap(self, argument: Any) -> Any:
        if isinstance(argument, torch.Tensor):
            return self.fake(argument)
        if type(argument) in (list, tuple):
            return type(argument)(self._swap(item) for item in argument)
        return argument

    def _real(self, result: Any) -> Any:
        if isinstance(result, torch.Tensor):
            return self._reals.get(id(result), result)
        return result

    def _check_liftable(self, real: torch.Tensor) -> None:
        if real.grad_fn is not None:
            raise CaptureError(
                reason="the step uses a tensor with a gradient history from outside of it "
                f"(shape {tuple(real.shape)}, made by {real.grad_fn.name()})",
                where=user_line(),
            )
        if real._post_accumulate_grad_hooks:
            raise CaptureError(reason="a parameter has a gradient hook", where=user_line())
        with torch._C.DisableTorchFunction():
            device = real.device
        if not devices.is_reachable(device) or real.layout is not torch.strided:
            raise CaptureError(
                reason=f"the step uses a {real.layout} tensor on {device}; dense ones on the CPU or XLA's GPU "
                "are compiled",
                where=user_line(),
            )


def _asked_of(func: Any) -> str:
    """The name of a tensor's method, or of the attribute that is being read."""
    name = getattr(func, "__name__", "")
    return getattr(getattr(func, "__self__", None), "__name__", "") if name == "__get__" else name


@contextlib.contextmanager
def _without_log() -> Iterator[None]:
    """Keeps torch from writing a stack trace where it refuses fake tensors what real ones may do: one line says so."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was_disabled


@contextlib.contextmanager
def _without_mkldnn() -> Iterator[None]:
    """Keeps torch from choosing oneDNN's fused kernels, which are opaque (`mkldnn_rnn_layer`)."""
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


def _backward(tensors, grad_tensors=None, retain_graph=None, create_graph=False, inputs=None, **more):
    """What `torch.autograd.backward` does, without its question to the mode, during whose answer the mode is off."""
    tensors = _tuple(tensors)
    gradients = _tuple(more.get("gradient", grad_tensors)) or (None,) * len(tensors)  # `Tensor.backward` has one
    gradients = torch.autograd._make_grads(tensors, gradients, is_grads_batched=False)
    retain_graph = create_graph if retain_graph is None else retain_graph
    torch.autograd.graph._engine_run_backward(
        tensors, gradients, retain_graph, create_graph, _tuple(inputs), allow_unreachable=True, accumulate_grad=True
    )


def _tuple(tensors: Any) -> tuple:
    return () if tensors is None else (tensors,) if isinstance(tensors, torch.Tensor) else tuple(tensors)


def _product(plain: str, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return one / other if plain == "addcdiv" else one * other


def _result_dtype(plain: str, args: tuple) -> torch.dtype:
    """The dtype that torch gives the result of an elementwise function, some of whose arguments are traced numbers."""
    if plain == "fill":
        return args[0].dtype
    operands = [1.0 if isinstance(one, float) else one for one in (args[1:] if plain == "where" else args)]
    operands = [one for one in operands if isinstance(one, torch.Tensor | int | float)]
    return elementwise_dtypes(*operands, type_promotion_kind=ELEMENTWISE_TYPE_PROMOTION_KIND.DEFAULT)[1]


def _as_tensor(argument: Any) -> Any:
    """A traced number as the 0-d tensor that holds it; anything else as it is."""
    return argument.tensor if isinstance(argument, TracedFloat) else argument


def _numbers(arguments: tuple) -> list[TracedFloat]:
    found = [argument for argument in arguments if isinstance(argument, TracedFloat)]
    for argument in arguments:
        if type(argument) in (list, tuple):
            found += [item for item in argument if isinstance(item, TracedFloat)]
    return found
