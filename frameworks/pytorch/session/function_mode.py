"""Sees every torch function that the script calls, and tells the session what kind of call it is."""

import contextlib
import enum
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils._device import _device_constructors

from trainingcompiler.frameworks.pytorch.interop import devices
from trainingcompiler.frameworks.pytorch.interop.gradients import is_backward
from trainingcompiler.frameworks.pytorch.interop.tensor_attributes import METADATA, METADATA_METHODS, READS, is_in_place
from trainingcompiler.frameworks.pytorch.tape.deferred_tensor import DeferredTensor


class Kind(enum.Enum):
    """What a torch function does, as far as recording is concerned.

    `OPERATOR` computes tensors. `IN_PLACE` writes to its first argument. `FACTORY` makes a tensor of nothing but
    numbers. `RESHAPE` changes how a tensor lies in its memory, or its values by the script's Python, in place. `QUERY`
    asks for shapes and the like, `GRAPH` for autograd's node. `READ` asks for values. `DRAW` makes random numbers and
    nothing else; `DRAW_FROM` makes them of probabilities, `DRAW_INTO` fills a tensor with them, and `DRAW_WITHIN` is
    Python of torch's that draws. `SET` assigns an attribute. `FLAG` sets `requires_grad`. `GRADIENT` is `.grad`.
    `BACKWARD` is one of the two functions for it. `OPAQUE` reaches into the graph that autograd would have. `NATIVE` is
    torch's own business.
    """

    OPERATOR = enum.auto()
    IN_PLACE = enum.auto()
    FACTORY = enum.auto()
    RESHAPE = enum.auto()
    QUERY = enum.auto()
    GRAPH = enum.auto()
    READ = enum.auto()
    DRAW = enum.auto()
    DRAW_FROM = enum.auto()
    DRAW_INTO = enum.auto()
    DRAW_WITHIN = enum.auto()
    SET = enum.auto()
    FLAG = enum.auto()
    GRADIENT = enum.auto()
    BACKWARD = enum.auto()
    OPAQUE = enum.auto()
    NATIVE = enum.auto()

    __hash__ = object.__hash__  # that of `enum` is a call in Python, at every call that is recorded


_OPAQUE = frozenset(
    "register_hook retain_grad grad register_post_accumulate_grad_hook _make_subclass as_subclass".split()
)
_DRAWS = frozenset("rand randn randint randperm normal rand_like randn_like randint_like".split())
_DRAWS_FROM = frozenset("multinomial bernoulli poisson binomial".split())
_DRAWS_INTO = frozenset("uniform_ normal_ random_ exponential_ cauchy_ log_normal_ geometric_ bernoulli_".split())
_RESHAPES = frozenset(
    "unsqueeze_ squeeze_ t_ transpose_ swapaxes_ swapdims_ as_strided_ detach_ set_ resize_ resize_as_ apply_ "
    "map_ map2_".split()
)
_DRAWS_WITHIN = frozenset(
    (F.gumbel_softmax, F.fractional_max_pool2d_with_indices, F.fractional_max_pool3d_with_indices)
)
# They give tensors of the host's data, or are answered by the process.
_NATIVE = frozenset(
    "tensor as_tensor from_numpy frombuffer asarray _set_grad_enabled set_grad_enabled share_memory_ pin_memory "
    "is_pinned is_shared record_stream __reduce_ex__ __deepcopy__ __setstate__ _typed_storage to_sparse to_mkldnn "
    "storage_type type_as_storage __dir__ __dlpack__ __dlpack_device__ manual_seed seed initial_seed get_rng_state "
    "set_rng_state is_tensor is_storage _is_view result_type can_cast promote_types finfo iinfo is_grad_enabled "
    "set_default_dtype typename broadcast_shapes".split()
)
_BY_NAME = (  # the first that has a name counts
    (frozenset({"requires_grad_"}), Kind.FLAG),
    (METADATA_METHODS, Kind.QUERY),
    (READS, Kind.READ),
    (_OPAQUE, Kind.OPAQUE),
    (_NATIVE, Kind.NATIVE),
    (_DRAWS, Kind.DRAW),
    (_DRAWS_FROM, Kind.DRAW_FROM),
    (_DRAWS_INTO, Kind.DRAW_INTO),
    (_RESHAPES, Kind.RESHAPE),
)
_kinds: dict[Any, Kind] = {}


def kind_of(function: Callable) -> Kind:
    """What a torch function does."""
    found = _kinds.get(function)
    if found is None:
        found = _kinds[function] = _classified(function)
    return found


def _classified(function: Any) -> Kind:
    name = getattr(function, "__name__", "")
    if name == "__get__":
        attribute = getattr(getattr(function, "__self__", None), "__name__", "")
        if attribute in ("grad", "_grad", ""):  # "": the property that stands in for `grad` has no name
            return Kind.GRADIENT
        if attribute == "grad_fn":
            return Kind.GRAPH
        return Kind.QUERY if attribute in METADATA or devices.is_shown(attribute) else Kind.OPERATOR
    if name in ("__set__", "__delete__"):
        is_flag = getattr(getattr(function, "__self__", None), "__name__", "") == "requires_grad"
        return Kind.FLAG if is_flag else Kind.SET
    if is_backward(function):
        return Kind.BACKWARD
    if function in _DRAWS_WITHIN:
        return Kind.DRAW_WITHIN
    for names, kind in _BY_NAME:
        if name in names:
            return kind
    if function in _device_constructors():
        return Kind.FACTORY
    return Kind.IN_PLACE if is_in_place(name) else Kind.OPERATOR


def opened(function: Callable) -> Callable:
    """A Python function of torch's that does not ask the modes, so that they are asked by what it calls."""
    asks = dict.fromkeys(
        ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"), _asks_nobody
    )
    given: Any = function
    body = types.FunctionType(given.__code__, {**given.__globals__, **asks}, given.__name__, given.__defaults__)
    body.__kwdefaults__ = given.__kwdefaults__
    return body


def _asks_nobody(*_: Any) -> bool:
    return False


def leaves_history(function: Any) -> bool:
    """Whether a function gives a tensor's values without its gradient history: `detach`, `.data`."""
    name = getattr(function, "__name__", "")
    if name == "__get__":
        return getattr(function.__self__, "__name__", "") == "data"
    return name in ("detach", "detach_")


class Watcher(Protocol):
    """Who is told of torch functions."""

    def function(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """Does what `function(*args, **kwargs)` does."""


class FunctionMode(TorchFunctionMode):
    """Hands every torch function of its thread to a session, while it is up.

    Modes are a stack: it goes up only on an empty one, or under the default device's, and comes down only from the top.

    Attributes:
        is_up: Whether it is on the stack.
    """

    def __init__(self, watcher: Watcher):
        super().__init__()
        self._function = watcher.function
        self.is_up = False

    def go_up(self) -> None:
        """Begins to see calls."""
        if not self.is_up:
            self.__enter__()
            self.is_up = True

    def come_down(self) -> None:
        """Ends seeing calls; where another mode lies above, it stays, and lets all pass."""
        if self.is_up and _get_current_function_mode() is self:
            self.__exit__(None, None, None)
            self.is_up = False

    @contextlib.contextmanager
    def seeing(self) -> Iterator[None]:
        """Sees calls of Python that a torch function runs, for which torch takes the mode off."""
        if _get_current_function_mode() is self:
            yield
            return
        with self:
            yield

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if torch.compiler.is_dynamo_compiling():  # it reads this mode too, and warns of what it finds further down
            return func(*args, **(kwargs or {}))
        kinds = tuple([kind for kind in types if kind is not DeferredTensor and _has_own_functions(kind)])
        if kinds and torch._C._is_torch_function_enabled():  # not while one of them calls `func` itself
            with self.seeing():  # what it asks torch for itself
                for kind in kinds:
                    result = kind.__torch_function__(func, kinds, args, kwargs or {})
                    if result is not NotImplemented:
                        return result
        return self._function(func, args, kwargs or {})


@functools.lru_cache(maxsize=1024)
def _has_own_functions(kind: Any) -> bool:
    """Whether torch asks a class what its functions mean: a subclass of `torch.Tensor` that somebody else wrote."""
    is_ours = kind is torch.Tensor or kind.__module__.startswith("trainingcompiler.")  # or a parameter's, on a device
    return not is_ours and kind.__torch_function__ is not torch._C._disabled_torch_function_impl
