"""Compares lowerings with PyTorch itself, overload by overload, on the arguments that real programs give them.

`assert_lowering_matches` checks one overload on given arguments. `check_operator` drives an operator of PyTorch's
`OpInfo` database forward and backward, `assert_program_matches` any function; both check every overload dispatched.
"""

import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import jax
import ml_dtypes
import numpy as np
import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only, tree_unflatten

from trainingcompiler.frameworks.pytorch.operators import LOWERINGS, VIEW_INVERSES
from trainingcompiler.frameworks.pytorch.operators.dtypes import jax_dtype

# One overload on float32 differs from torch by the order of its sums and by its approximations of transcendental
# functions, each a few units in the last place (torch's own tolerance, 1.3e-6, is for the same formula); on 16-bit
# types both sides round the same float32 result once, so that they differ by at most one unit in the last place.
TOLERANCES = {
    torch.float64: {"rtol": 1e-7, "atol": 1e-7},
    torch.float32: {"rtol": 1.3e-5, "atol": 1e-5},
    torch.float16: {"rtol": 2e-3, "atol": 1e-5},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-5},
}

# Compiling is nearly all of the tests' time, and how well XLA optimizes is not what they are about.
COMPILER_OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}

UNCOMPARED = ("aten.empty", "aten.new_empty", "aten.resize", "aten.rand", "aten.bernoulli", "aten.normal")
"""Prefixes of overloads whose values are undefined or random."""


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's values; bfloat16 as `ml_dtypes.bfloat16`."""
    tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def to_torch(array) -> torch.Tensor:
    """The array's values; the inverse of `to_numpy`."""
    array = np.array(array)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


@dataclass
class Call:
    """One overload called at dispatch level: its functional name, arguments as they were before, and results."""

    name: str
    args: tuple
    kwargs: dict
    expected: object
    in_place: bool = False

    def __str__(self) -> str:
        shown = tree_map_only(torch.Tensor, lambda t: f"{t.dtype}{list(t.shape)}", (self.args, self.kwargs))
        return f"{self.name}{shown}"


class FunctionalRecorder(TorchDispatchMode):
    """Collects every overload dispatched inside it in `calls`, in-place ones under their functional name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        before = tree_map_only(torch.Tensor, lambda t: t.detach().clone(memory_format=torch.contiguous_format), args)
        result = func(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded not in func.tags:
            packet, _, overload = str(func).rpartition(".")
            in_place = packet.endswith("_") and not packet.endswith("__")
            expected = tree_map_only(torch.Tensor, lambda t: t.detach().clone(), result)
            name = f"{packet.removesuffix('_') if in_place else packet}.{overload}"
            self.calls.append(Call(name, before, dict(kwargs), expected, in_place))
        return result


def assert_lowering_matches(overload_name: str, *args, tolerance: dict[str, float] | None = None, **kwargs) -> None:
    """Calls the overload in torch and our lowering under `jax.jit` on the same values and compares the results.

    Args:
        overload_name: as `str(overload)` prints it, `"aten.add.Tensor"`.
        *args: the overload's arguments, with torch tensors.
        tolerance: `rtol` and `atol` in place of each dtype's own.
        **kwargs: the overload's keyword arguments.

    Raises:
        AssertionError: a result's structure, dtype, shape or value differs.
    """
    _, packet, overload = overload_name.split(".")
    expected = getattr(getattr(torch.ops.aten, packet), overload)(*args, **kwargs)
    compare([Call(overload_name, args, kwargs, expected)], (), tolerance)


def assert_view_inverse_matches(overload_name: str, base: torch.Tensor, *args, **kwargs) -> None:
    """Overwrites a view in torch, and through the registered inverse in JAX, and compares the base afterwards."""
    _, packet, overload = overload_name.split(".")
    written = base.clone()
    child = getattr(getattr(torch.ops.aten, packet), overload)(written, *args, **kwargs)
    for view in child if isinstance(child, list | tuple) else [child]:
        view.copy_(torch.arange(view.numel()).reshape(view.shape) + 100)
    leaves, spec = tree_flatten(child)

    def write(parent, *leaves):
        return VIEW_INVERSES[overload_name](parent, tree_unflatten(list(leaves), spec), *args, **kwargs)

    with jax.enable_x64(True):
        got = jax.jit(write)(to_numpy(base), *map(to_numpy, leaves))
    torch.testing.assert_close(to_torch(got), written, rtol=0, atol=0)


def assert_program_matches(function: Callable[..., object], *args, skip: Collection[str] = ()) -> None:
    """Runs `function(*args)` in torch and checks every overload that it dispatched.

    Args:
        function: any torch code; what it does in its own `backward()` is checked too.
        *args: its arguments.
        skip: names of overloads that are not checked; any other without a lowering fails.
    """
    with FunctionalRecorder() as recorder:
        function(*args)
    compare(recorder.calls, skip)


def check_operator(
    name: str,
    dtype: torch.dtype = torch.float32,
    *,
    samples: int = 6,
    skip: Collection[str] = (),
    tolerance: dict[str, float] | None = None,
) -> None:
    """Checks every overload that an operator's `OpInfo` samples dispatch, forward and backward.

    Args:
        name: `OpInfo.name`, `"nn.functional.gelu"`; `"max:binary"` where the database has variants of one name.
        dtype: of the samples.
        samples: how many, spread over those that PyTorch generates.
        skip: names of overloads that are not checked; any other without a lowering fails.
        tolerance: `rtol` and `atol` in place of the dtype's own.
    """
    compare(list(operator_calls(name, dtype, samples)), skip, tolerance)


def check_operators(names: str, dtype: torch.dtype, *, samples: int = 2, skip: Collection[str] = ()) -> None:
    """`check_operator` of several operators in one compiled program, which is faster.

    Args:
        names: as `check_operator` takes them, separated by white space.
        dtype: of the samples.
        samples: how many of each operator.
        skip: names of overloads that are not checked; any other without a lowering fails.
    """
    compare([call for name in names.split() for call in operator_calls(name, dtype, samples)], skip)


def operator_calls(name: str, dtype: torch.dtype, samples: int) -> Iterator[Call]:
    """The overloads dispatched by an operator's samples and by the gradients of their results."""
    base, _, variant = name.partition(":")
    [operator] = [op for op in op_db if op.name == base and op.variant_test_name == variant]
    differentiable = operator.supports_autograd and dtype in operator.supported_backward_dtypes("cpu")
    # OpInfo.sample_inputs walks the call stack, and torch.manual_seed formats it, at ten times the cost of the rest.
    torch.default_generator.manual_seed(0)
    random.seed(0)
    inputs = list(operator.sample_inputs_func(operator, "cpu", dtype, differentiable))
    step = max(1, len(inputs) // samples)
    for sample in inputs[::step][:samples]:
        with FunctionalRecorder() as recorder:
            result = operator(sample.input, *sample.args, **sample.kwargs)
        outputs, leaves = (
            [t for t in tree_flatten(tree)[0] if isinstance(t, torch.Tensor) and t.requires_grad]
            for tree in (result, (sample.input, sample.args, sample.kwargs))
        )
        if outputs and leaves:
            gradients = [torch.linspace(-1, 2, t.numel()).reshape(t.shape).to(t.dtype) for t in outputs]
            with recorder:
                torch.autograd.grad(outputs, leaves, gradients, allow_unused=True)
        yield from recorder.calls


def compare(calls: list[Call], skip: Collection[str] = (), tolerance: dict[str, float] | None = None) -> None:
    """Lowers all `calls` into one jitted function, one compilation for all, and compares each result.

    Args:
        calls: what torch computed.
        skip: names of overloads that are not checked; any other without a lowering fails.
        tolerance: `rtol` and `atol` in place of each dtype's own.

    Raises:
        AssertionError: a lowering is missing, fails to trace, or differs from torch.
    """
    calls = [call for call in calls if _is_comparable(call) and call.name not in skip]
    missing = sorted({call.name for call in calls} - LOWERINGS.keys())
    assert not missing, f"no lowering for {missing}"
    flat = [tree_flatten((call.args, call.kwargs)) for call in calls]
    tensors = [[to_numpy(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)] for leaves, _ in flat]

    def program(tensors):
        results = []
        for call, (leaves, spec), arrays in zip(calls, flat, tensors, strict=True):
            feed = iter(arrays)
            arguments = [next(feed) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            args, kwargs = tree_unflatten(arguments, spec)
            try:
                result = LOWERINGS[call.name](*args, **kwargs)
            except Exception as error:
                raise AssertionError(f"{call} failed to lower: {type(error).__name__}: {error}") from error
            results.append(tuple(result) if isinstance(result, list | tuple) else (result,))
        return results

    with jax.enable_x64(True):
        compiled = jax.jit(program).lower(tensors).compile(COMPILER_OPTIONS)
        results = compiled(tensors)
    for call, result in zip(calls, results, strict=True):
        _assert_same(call, result, tolerance)


def _is_comparable(call: Call) -> bool:
    leaves = tree_flatten((call.args, call.kwargs, call.expected))[0]
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    results = tree_flatten(call.expected)[0]
    return (
        not call.name.startswith(UNCOMPARED)
        and not any(tensor.dtype.is_complex for tensor in tensors)
        and any(isinstance(result, torch.Tensor) for result in results)
    )


def _assert_same(call: Call, result: tuple, tolerance: dict[str, float] | None) -> None:
    expected = call.expected if isinstance(call.expected, list | tuple) else (call.expected,)
    expected, result = tree_map(lambda x: x, (list(expected), list(result)))
    assert len(expected) == len(result), f"{call}: torch returns {len(expected)} results, the lowering {len(result)}"
    for theirs, ours in zip(expected, result, strict=True):
        if theirs is None or theirs.numel() == 0 and ours is None:
            continue
        if not call.in_place:  # The caller casts what is written in place to the dtype of the tensor written to.
            assert jax_dtype(theirs.dtype) == ours.dtype, f"{call}: torch gives {theirs.dtype}, not {ours.dtype}"
        assert tuple(theirs.shape) == ours.shape, f"{call}: torch gives {tuple(theirs.shape)}, not {ours.shape}"
        bounds = tolerance or TOLERANCES.get(theirs.dtype, {"rtol": 0, "atol": 0})
        torch.testing.assert_close(
            to_torch(ours).to(theirs.dtype), theirs, **bounds, equal_nan=True, msg=lambda text: f"{call}: {text}"
        )
