"""One sample of an operator: run in torch, captured as a step, and compiled with others into one program."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
from comparison import distance
from exclusions import Tie
from torch.testing._internal.opinfo.core import OpInfo, SampleInput

from trainingcompiler.errors import CaptureError
from trainingcompiler.frameworks.pytorch.capture.capture import capture
from trainingcompiler.frameworks.pytorch.capture.traced_float import ConcretizationError
from trainingcompiler.frameworks.pytorch.interop.arrays import numpy_view
from trainingcompiler.frameworks.pytorch.interop.pytree import flatten, map_leaves
from trainingcompiler.frameworks.pytorch.interop.torch_modes import TorchModes
from trainingcompiler.frameworks.pytorch.lowering.interpreter import lower
from trainingcompiler.frameworks.pytorch.operators import value_checks
from trainingcompiler.frameworks.pytorch.tape.entries import Entry
from trainingcompiler.frameworks.pytorch.tape.replay import tensors_in

# Compiling is nearly all of the time, and how well XLA optimizes is not what this is about.
COMPILER_OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}

WIDER = {
    torch.float32: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
}


_NEIGHBOURS = 8


class TorchRefuses(Exception):
    """torch itself cannot run the sample."""


class CannotCompile(Exception):
    """The sample cannot be captured; a training step would run it in torch."""


class Trial:
    """A sample and what torch makes of it.

    Attributes:
        expected: torch's results, then its gradients (None where there is none), then the arguments it has written to.
        arrays: The values of the captured program's inputs.
        cotangents: What the gradients are computed for.
        is_random: Whether the captured program draws random numbers.
        refusal: Why the captured program could not be lowered, if it could not.
    """

    def __init__(self, operator: OpInfo, sample: SampleInput, is_gauged: bool = False, tie: Tie | None = None):
        self._operator, self._process = operator, sample.output_process_fn_grad
        self._is_gauged, self._tie = is_gauged, tie
        self.arguments = map_leaves(_Leaves(), (sample.input, sample.args, sample.kwargs))
        self._before = {id(leaf): _array(leaf) for leaf in _tensors(self.arguments)}
        # A view's memory may be larger than itself, and only the original's has what lies beyond.
        torch.default_generator.manual_seed(0)
        try:
            results, gradients, self.cotangents = self.run_in_torch(self.arguments, None)
        except Exception as error:
            raise TorchRefuses(str(error)) from error
        self.expected = [_kept(tensor) for tensor in (*results, *gradients)]
        self.refusal = ""

    def run_in_torch(self, arguments: Any, cotangents: list[torch.Tensor] | None) -> tuple[list, list, list]:
        """The operator's results, their gradients, and the cotangents of these, made here if they are None."""
        input, args, kwargs = arguments
        result = self._operator(input, *args, **kwargs)
        processed = self._process(result)
        roots = [tensor for tensor in _tensors(processed) if tensor.requires_grad]
        leaves = [tensor for tensor in _tensors(arguments) if tensor.requires_grad]
        if cotangents is None:
            cotangents = [_ramp(root) for root in roots]
        gradients = torch.autograd.grad(roots, leaves, cotangents, allow_unused=True) if roots and leaves else ()
        if self._tie is not None:
            position, default, has_indices = self._tie
            dim = kwargs.get("dim", args[position] if len(args) > position else default)
            result = _selected(result, input, dim) if has_indices else result
            gradients = [_by_value(gradient, input, dim) for gradient in gradients]
        return _tensors(processed if self._is_gauged else result), list(gradients), cotangents

    def in_float64(self) -> tuple[list[torch.Tensor | None], list[float]]:
        """What torch computes of the same values in float64, and how far from that its own results are at most.

        The latter is taken over these arguments and some neighbours of them, since errors of rounding are chaotic.
        """
        references, errors = [], [0.0] * len(self.expected)
        for seed in range(_NEIGHBOURS + 1):
            narrow, wide = self._copies(seed)
            references.append(self._run_copies(wide, torch.float64))
            results = self._run_copies(narrow, torch.float32) if seed else self.expected
            for index, (theirs, reference) in enumerate(zip(results, references[-1], strict=True)):
                if theirs is not None and reference is not None:
                    errors[index] = max(errors[index], distance(theirs, reference))
        return references[0], errors

    def _copies(self, seed: int) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
        """The tensor arguments as they were, one bit more or less each but for seed 0; and the same in float64."""
        signs = np.random.default_rng(seed)
        narrow, wide = {}, {}
        for leaf in _tensors(self.arguments):
            values = self._before[id(leaf)]
            if leaf.dtype in WIDER:
                exact = values.astype(np.complex128 if leaf.is_complex() else np.float64)
                if seed:
                    exact = exact * (1 + torch.finfo(leaf.dtype).eps * signs.choice((-1, 1), exact.shape))
                values = np.array(exact)
            tensor = torch.from_numpy(np.array(values))
            narrow[id(leaf)] = tensor.to(leaf.dtype).requires_grad_(leaf.requires_grad)
            wide[id(leaf)] = narrow[id(leaf)].detach().to(WIDER.get(leaf.dtype, leaf.dtype))
            wide[id(leaf)].requires_grad_(leaf.requires_grad)
        return narrow, wide

    def _run_copies(self, copies: dict[int, torch.Tensor], default: torch.dtype) -> list[torch.Tensor | None]:
        def replaced(leaf: Any) -> Any:
            if isinstance(leaf, torch.dtype) and default is torch.float64:
                return WIDER.get(leaf, leaf)
            return copies[id(leaf)] if isinstance(leaf, torch.Tensor) else leaf

        cotangents = self.cotangents
        if default is torch.float64:
            cotangents = [cotangent.to(WIDER.get(cotangent.dtype, cotangent.dtype)) for cotangent in cotangents]
        torch.set_default_dtype(default)
        try:
            results, gradients, _ = self.run_in_torch(map_leaves(replaced, self.arguments), cotangents)
        finally:
            torch.set_default_dtype(torch.float32)
        return [_kept(tensor) for tensor in (*results, *gradients, *(copies[id(leaf)] for leaf in self._written))]

    def capture(self) -> None:
        """Captures the sample as a step.

        Raises:
            CannotCompile: The step would run in torch.
        """
        leaves, structure = flatten(((self.arguments, self.cotangents), {}))
        positions: list[int | None] = []  # of each result among the distinct tensors; None is no tensor

        def run(arguments: Any, cotangents: list[torch.Tensor]) -> Any:
            found = self.run_in_torch(arguments, cotangents)
            distinct = {id(tensor): position for position, tensor in enumerate(tensors_in(found))}
            positions[:] = [distinct.get(id(leaf)) for leaf in flatten(found)[0]]
            return found

        entry = Entry(run, structure, leaves, TorchModes.now(), outputs=None, seed=0)
        try:
            captured = capture([entry])
        except (CaptureError, ConcretizationError) as error:
            raise CannotCompile(getattr(error, "reason", "a number decides what is computed")) from error
        except Exception as error:  # as where a training step is captured
            raise CannotCompile(f"{type(error).__name__}: {error}".split("\n")[0]) from error
        slots = [None if position is None else entry.outputs[position] for position in positions[: len(self.expected)]]
        written = [item for item in captured.lifted if item.new_value != item.value]
        self._written = [item.tensor() for item in written]
        self.expected += self.written()
        self._values = [None if slot is None else captured.outputs[slot] for slot in slots]
        self._values += [item.new_value for item in written]
        self._inputs = [item.value for item in captured.lifted] + [value for _, value in captured.seeds]
        self.arrays = [self._value_of(item.tensor()) for item in captured.lifted] + [np.int64(0)]
        needed = [value for value in self._values if value is not None]
        self._function = lower(captured.graph, needed)
        self.is_random = any(node.seed is not None for node in captured.graph.live_nodes(needed))

    def written(self) -> list[torch.Tensor | None]:
        """The arguments that the operator writes to, as torch has left them."""
        return [_kept(tensor) for tensor in self._written]

    def _value_of(self, tensor: Any) -> np.ndarray:
        return self._before[id(tensor)] if id(tensor) in self._before else _array(tensor)

    def compute(self, arrays: list[Any]) -> tuple[list[Any], Any]:
        """The results for the values of the inputs, and whether what torch's kernels check of values holds."""
        try:
            with value_checks.collecting() as conditions:
                results = iter(self._function(dict(zip(self._inputs, arrays, strict=True))))
        except CaptureError as error:
            self.refusal = error.reason.split("\n")[0]
            return [], True
        holds = value_checks.all_hold(conditions) if conditions else True
        return [None if value is None else next(results) for value in self._values], holds


def compiled(trials: list[Trial]) -> Callable[[list[list[Any]]], list[tuple[list[Any], Any]]]:
    """Several trials as one compiled program."""

    def program(arrays: list[list[Any]]) -> list[tuple[list[Any], Any]]:
        return [trial.compute(inputs) for trial, inputs in zip(trials, arrays, strict=True)]

    with jax.enable_x64(True):
        executable = jax.jit(program).lower([trial.arrays for trial in trials]).compile(COMPILER_OPTIONS)

    def run(arrays: list[list[Any]]) -> list[tuple[list[Any], Any]]:
        with jax.enable_x64(True):
            return executable(arrays)

    return run


class _Leaves:
    """Cuts tensors off the graph that made them; one that appears twice stays one."""

    def __init__(self) -> None:
        self._known: dict[int, torch.Tensor] = {}

    def __call__(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if id(leaf) not in self._known:
            self._known[id(leaf)] = leaf.detach().requires_grad_(leaf.requires_grad)
        return self._known[id(leaf)]


def _tensors(value: Any) -> list[torch.Tensor]:
    leaves, _ = flatten(value)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _selected(result: Any, input: torch.Tensor, dim: int) -> list[torch.Tensor]:
    """The results with, in place of their last, the indices, the values that these stand for."""
    *others, indices = [result] if isinstance(result, torch.Tensor) else result
    if not input.ndim:
        return [*others, input.reshape(1).take(indices)]
    whole = indices if indices.ndim == input.ndim else indices.unsqueeze(dim)
    return [*others, input.take_along_dim(whole, dim)]


def _by_value(gradient: torch.Tensor, input: torch.Tensor, dim: int) -> torch.Tensor:
    """What a gradient says that does not depend on which of several equal values received it."""
    wide = gradient.to(torch.float64)
    return torch.stack([wide.sum(dim), (wide * input.detach()).sum(dim)])


def _array(tensor: torch.Tensor) -> np.ndarray:
    return numpy_view(tensor.detach().resolve_conj().resolve_neg().contiguous()).copy()


def _kept(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def _ramp(root: torch.Tensor) -> torch.Tensor:
    """A cotangent with a different value for each element."""
    values = torch.linspace(-1, 2, root.numel(), dtype=torch.float64).reshape(root.shape)
    return (torch.complex(values, values.flip(0)) if root.is_complex() and root.ndim else values).to(root.dtype)
