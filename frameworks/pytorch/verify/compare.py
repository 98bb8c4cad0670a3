"""Judges one run of a compiled program: the captured graph, replayed in torch on the same values.

A result is held to the rounding that its graph may have. Where it is off by more, it is looked at closer: how far torch
itself is off, once its gradients or its inputs are off by rounding (Adam makes full-size updates of the rounding of a
gradient that is zero), and then operator by operator.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import torch

from trainingcompiler.frameworks.pytorch.capture.inspection import Inspection
from trainingcompiler.frameworks.pytorch.graph.ir import Node, Ref, references
from trainingcompiler.frameworks.pytorch.interop.arrays import numpy_view, tensor_of
from trainingcompiler.frameworks.pytorch.lowering.interpreter import lower
from trainingcompiler.frameworks.pytorch.verify.torch_replay import replay, run_node, widened
from trainingcompiler.targets.xla_options import sound_fusions

# One operator, on equal inputs: sums of 10^4 terms in another order. A whole step may amplify that ten times.
OPERATOR_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
STEP_FACTOR = 10.0
TWIN_FACTOR = 3.0  # the twin is one sample of the noise; a second sample is rarely three times as large
_NOTHING = 1e-3  # of the largest value of its kind: a result below it consists of rounding
_MOST_ROUNDING = 0.1  # of a result's scale; an error of torch's that is larger is none of rounding: an overflow, say
_CANCELLED = 1e-2  # of an operator's largest input, likewise
_TURNED_OVER = 1e-2  # the share of a result, by its norm, that comparisons may change which rounding turns over
_ROUNDING = 10.0  # units in the last place, of a twin's inputs and gradients: sums of 10^3 terms in another order
_COMPARING = frozenset(
    "gt lt ge le eq ne sign sgn round floor ceil trunc heaviside bucketize searchsorted abs max min amax amin argmax "
    "argmin maximum minimum fmax fmin sort argsort topk kthvalue median nanmedian mode cummax cummin".split()
)
_CLIPPING = ("relu", "threshold", "hard", "shrink", "clamp", "pool", "l1_loss")  # in the names of such operators
_OPTIMIZER = "._fused_"
_PIECE = 2**15  # elements: so many stay in the cache, and torch does not share them between threads


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """An operator whose result in the executable is not torch's.

    Attributes:
        operator: Its overload.
        where: The script's line.
        relative: The largest difference over the largest value.
        torchs: torch's value where the difference is largest.
        compiled: The executable's value there.
    """

    operator: str
    where: str | None
    relative: float
    torchs: float
    compiled: float

    def __str__(self) -> str:
        return (
            f"{self.operator} gives {self.compiled:.9g} where PyTorch gives {self.torchs:.9g} (relative difference "
            f"{self.relative:.1e})"
        )


@dataclass(kw_only=True, slots=True)
class Verdict:
    """What a check of one run has found.

    Attributes:
        compared: How many tensors of the program's results were compared.
        operators: How many operators the graph has.
        largest: The largest relative difference of a result, and the result's name; of those that torch's own noise or
            a comparison excuses none.
        noisy: How many of these there are.
        over: Results beyond their tolerance, and beyond torch's own noise.
        worst: Of these, the largest relative difference, torch's value and the executable's there, and the name.
        first: The first operator at fault; None if no operator is, so that only the whole program differs.
        is_flushed: Whether torch has these results too, once it takes denormal numbers for 0.
    """

    compared: int = 0
    operators: int = 0
    largest: tuple[float, str] = (0.0, "")
    noisy: int = 0
    over: list[str] = field(default_factory=list)
    worst: tuple[float, float, float, str] | None = None
    first: Difference | None = None
    is_flushed: bool = False

    @property
    def differs(self) -> bool:
        """Whether the program computes something else than torch does."""
        return bool(self.over) or self.first is not None


class Judge:
    """Compares one run with what torch computes.

    Args:
        inspection: One run of the program.
        wanted: The numbers of the results to compare.
    """

    def __init__(self, inspection: Inspection, wanted: Collection[int]):
        self._of = inspection
        self._wanted = list(wanted)
        self.nodes = inspection.graph.live_nodes(self._wanted)
        self._values: dict[int, torch.Tensor] = {}
        self._right: dict[int, torch.Tensor] = {}
        self._gradients = gradients_in(self.nodes)
        self._tail = _downstream(self.nodes, self._gradients)
        given = {*inspection.inputs, *inspection.graph.constants}
        before = {number for node in self._tail for number in references(node)} - given
        self._kept = {*self._wanted, *before, *self._gradients}

    def replay(self) -> None:
        """Has torch compute the results."""
        self._values = {number: _tensor(array) for number, array in self._of.inputs.items()}
        self._values |= self._of.graph.constants
        self._right = replay(self.nodes, self._values, self._kept)

    def judge(self, results: Mapping[int, Any], thorough: bool = False) -> Verdict:
        """Compares the results; one that is off is looked at closer.

        Args:
            results: What the program has computed, by number.
            thorough: Whether to look at every operator also where all results are right.
        """
        verdict = Verdict(compared=len(self._wanted), operators=len(self.nodes))
        judged = {number: _tensor(results[number]) for number in self._wanted}
        right = {number: self._right.get(number, self._values.get(number)) for number in self._wanted}
        scales = self._scales(right)
        factor = STEP_FACTOR * self._tolerance()
        off: dict[int, float] = {}
        for number in self._wanted:
            relative = _relative(right[number], judged[number], scales[number])
            if relative > _allowed(right[number], factor):
                off[number] = relative
            elif relative >= verdict.largest[0]:
                verdict.largest = relative, self._name(number)
        suspected = len(off)
        off = self._without_noise(off, right, scales, self._tail_twin)
        if not thorough:
            off = self._without_turned_over(off, right, judged)
        off = self._without_noise(off, right, scales, self._whole_twin)
        off = self._without_noise(off, right, scales, self._wide_twin, most=_MOST_ROUNDING)
        if off or thorough:
            verdict.first = self._first_difference()
        if verdict.first is None:
            off = self._without_turned_over(off, right, judged)
        verdict.noisy = suspected - len(off)
        verdict.over = [self._name(number) for number in off]
        if off:
            flushed = self._flushed()
            verdict.is_flushed = bool(flushed) and all(
                _relative(flushed[n], judged[n], _largest(flushed[n])) <= _allowed(right[n], factor) for n in off
            )
            number = max(off, key=lambda number: off[number])
            verdict.largest = off[number], self._name(number)
            _, place = _difference(right[number], judged[number], 0.0)
            values = _at(right[number], place), _at(judged[number], place)
            verdict.worst = off[number], *values, self._name(number)
        return verdict

    def _without_noise(
        self, off: dict[int, float], right, scales, twin: Callable, most: float = float("inf")
    ) -> dict[int, float]:
        """Results that are further from torch's than a twin of its is, by the factor for one sample of noise.

        Args:
            off: How far each is.
            right: torch's.
            scales: What distances are relative to.
            twin: Gives the twin's results.
            most: The largest distance of a twin that counts as noise.
        """
        if not off:
            return off
        try:
            other = twin()
        except RuntimeError:  # an operator that refuses a value which rounding has put out of its range
            other = {}
        noise = {n: _relative(right[n], other.get(n, right[n]), scales[n]) for n in off}
        return {n: relative for n, relative in off.items() if relative > TWIN_FACTOR * noise[n] or noise[n] > most}

    def _without_turned_over(self, off: dict[int, float], right, judged) -> dict[int, float]:
        """Results that differ by more than comparisons make them that rounding has turned over."""
        if not off or not self._compares():
            return off
        return {n: relative for n, relative in off.items() if not _is_turned_over(right[n], judged[n], self._before(n))}

    def _name(self, number: int) -> str:
        return self._of.names.get(number, "a result")

    def _tolerance(self) -> float:
        """Of the coarsest dtype that the graph computes in."""
        dtypes = {meta[1] for node in self.nodes for meta in node.metas if meta is not None}
        dtypes |= {self._values[number].dtype for number in self._of.inputs}
        return max((OPERATOR_TOLERANCES.get(dtype, 0.0) for dtype in dtypes if not _is_step_number(dtype)), default=0.0)

    def _scales(self, right: Mapping[int, torch.Tensor]) -> dict[int, float]:
        """What a difference of each result is relative to: the largest change of a state, the largest value of others.

        Rates are small: a state's values would hide what has become of its gradient.
        """
        own, kinds = {}, {}
        for number, value in right.items():
            old = self._before(number)
            change = _distance(value, old) if old is not None and value.is_floating_point() else float("inf")
            own[number] = change if change < float("inf") else _largest(value)
            kind = _kind(self._of.names.get(number), number)
            kinds[number] = kind
        largest: dict[Any, float] = {}
        for number, kind in kinds.items():
            largest[kind] = max(largest.get(kind, 0.0), own[number])
        return {
            number: max(own[number], _NOTHING * largest[kinds[number]], _resolution(right[number], self._tolerance()))
            for number in right
        }

    def _before(self, number: int) -> torch.Tensor | None:
        """The values of the state whose place a result takes."""
        return self._values.get(self._of.replaced.get(number, -1))

    def _compares(self) -> bool:
        """Whether an operator goes one way or another by the values that it is given."""
        names = {node.operator.split(".")[1] for node in self.nodes if node.operator.count(".") == 2}
        return bool(names & _COMPARING) or any(word in name for name in names for word in _CLIPPING)

    def _tail_twin(self) -> dict[int, torch.Tensor]:
        """What torch's optimizers make of gradients that are off by rounding."""
        if not self._gradients:
            return {}
        gradients = {number: self._right[number] for number in self._gradients if number in self._right}
        largest = max(map(_largest, gradients.values()), default=0.0)
        values = self._values | self._right
        for number, gradient in gradients.items():
            values[number] = gradient + _ROUNDING * torch.finfo(gradient.dtype).eps * largest
        return replay(self._tail, values, self._wanted)

    def _whole_twin(self) -> dict[int, torch.Tensor]:
        """What torch computes of inputs that are off by rounding; a state is off by as much before and after."""
        generator = torch.Generator().manual_seed(0)
        values = dict(self._values)
        for number in self._of.inputs:
            value = values[number]
            if value.is_floating_point() and value.dim():
                noise = torch.randn(value.shape, generator=generator).to(value.dtype)
                noise[value == value.round()] = 0  # a mask or a target has none, and a loss may refuse 1.0000001
                values[number] = value * (1 + _ROUNDING * torch.finfo(value.dtype).eps * noise)
        results = replay(self.nodes, values, self._wanted)
        for number, result in results.items():
            old = self._before(number)
            if old is not None and result.is_floating_point():
                results[number] = result - (values[self._of.replaced[number]] - old)
        return results

    def _wide_twin(self) -> dict[int, torch.Tensor]:
        """What torch computes in float64 where the graph has float32: how far torch itself is off.

        The gradient of a bias before BatchNorm is 0, and torch's is rounding, whatever the inputs are.
        """
        values = {n: value.double() if value.dtype is torch.float32 else value for n, value in self._values.items()}
        results = replay(map(widened, self.nodes), values, self._wanted)
        return {number: result.to(self._right[number].dtype) for number, result in results.items()}

    def _flushed(self) -> dict[int, torch.Tensor]:
        """What torch computes where denormal numbers are 0, as XLA has them on a CPU; empty where it cannot."""
        was_flushed = flushes_denormals()  # the script's own wish
        if not torch.set_flush_denormal(True):
            return {}
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the others do not know of it
        try:
            return replay(self.nodes, self._values, self._wanted)
        finally:
            torch.set_num_threads(threads)
            torch.set_flush_denormal(was_flushed)

    def _first_difference(self) -> Difference | None:
        every = _every_value(self._of, self.nodes)
        for node in self.nodes:
            if node.seed is not None or node.operator.startswith(("aten.empty", "aten.new_empty")):
                continue
            with torch.no_grad(), torch._C._DisableAutocast():
                outputs = run_node(node, every)
            for number, right in outputs.items():
                judged = every[number]
                # Sums cancel: the gradient of a bias before BatchNorm is nothing but the rounding of its summands.
                given = max((_largest(every[read]) for read in references(node)), default=0.0)
                relative, place = _difference(right, judged, _CANCELLED * given)
                if relative > OPERATOR_TOLERANCES.get(right.dtype, 0.0) and not (
                    _allowed(right, 1.0) == 0.0 and _is_turned_over(right, judged)
                ):
                    return Difference(
                        operator=node.operator,
                        where=node.where,
                        relative=relative,
                        torchs=_at(right, place),
                        compiled=_at(judged, place),
                    )
        return None


def check(inspection: Inspection) -> Verdict:
    """Replays the graph in torch, compares the results, and looks for the first operator at fault.

    Args:
        inspection: One run of the program.

    Returns:
        What was found. The search compiles the graph again, with every value as a result, so that each operator can
        be given the executable's own inputs.
    """
    judge = Judge(inspection, inspection.results)
    judge.replay()
    return judge.judge(inspection.results, thorough=True)


def flushes_denormals() -> bool:
    """Whether torch takes denormal numbers for 0 in this thread."""
    return not (torch.tensor(torch.finfo(torch.float32).tiny) / 2)


def gradients_in(nodes: Iterable[Node]) -> set[int]:
    """The numbers of the gradients that torch's fused optimizers read."""
    return {
        ref.id
        for node in nodes
        if _OPTIMIZER in node.operator and len(node.args) > 1
        for ref in node.args[1]
        if isinstance(ref, Ref)
    }


def _downstream(nodes: Iterable[Node], numbers: Collection[int]) -> list[Node]:
    """The operators that depend on values."""
    behind, found = set(numbers), []
    for node in nodes:
        if behind.intersection(references(node)):
            behind.update(number for number in node.outputs if number is not None)
            found.append(node)
    return found


def _every_value(inspection: Inspection, nodes: list[Node]) -> dict[int, torch.Tensor]:
    numbers = [number for node in nodes for number in node.outputs if number is not None]
    given = list(inspection.inputs)
    function = lower(inspection.graph, numbers)
    inputs = [numpy_view(_tensor(array).contiguous()) for array in inspection.inputs.values()]
    with jax.enable_x64(True):
        arrays = _compiled(lambda *values: function(dict(zip(given, values, strict=True))))(*inputs)
    every = {number: tensor_of(array) for number, array in zip(numbers, arrays, strict=True)}
    every |= {number: _tensor(array) for number, array in inspection.inputs.items()}
    return every | dict(inspection.graph.constants)


def _compiled(function: Callable) -> Callable:
    return jax.jit(function, compiler_options=sound_fusions(jax.default_backend()))


def _tensor(array: Any) -> torch.Tensor:
    if isinstance(array, torch.Tensor):
        return array
    with jax.enable_x64(True):
        return tensor_of(jax.numpy.asarray(array)).clone()


def _kind(name: str | None, number: int) -> Any:
    """Results of one kind are of one size: `"new exp_avg of 0.weight"` and `"new exp_avg of 0.bias"`."""
    if name is None:
        return number
    kind, of, _ = name.partition(" of ")
    return kind if of else "new"


def _is_step_number(dtype: torch.dtype) -> bool:
    return not dtype.is_floating_point and not dtype.is_complex


def _allowed(right: torch.Tensor, factor: float) -> float:
    return factor if right.is_floating_point() or right.is_complex() else 0.0


def _resolution(right: torch.Tensor, tolerance: float) -> float:
    """The change of a state that is lost in the rounding of its values, over the tolerance of a difference."""
    if not right.is_floating_point() or not tolerance:
        return 0.0
    return 2 * torch.finfo(right.dtype).eps * _largest(right) / (STEP_FACTOR * tolerance)


def _is_turned_over(right: torch.Tensor, judged: torch.Tensor, old: torch.Tensor | None = None) -> bool:
    """Whether results differ as little as comparisons make them that rounding has turned over.

    A few places of maxima, a count; of the gradient of a weight before a ReLU what one row of the batch adds to it.
    """
    if right.numel() == 0:
        return False
    if right.is_floating_point() or right.is_complex():
        change = torch.linalg.vector_norm(right if old is None else right - old).item()
        return (
            torch.linalg.vector_norm(right - judged).item() <= _TURNED_OVER * change
        )  # false where either is infinite
    if right.numel() > 1:
        return (right != judged).double().mean().item() <= _TURNED_OVER
    return abs(right.item() - judged.item()) <= max(1.0, _TURNED_OVER * abs(right.item()))


def _largest(tensor: torch.Tensor) -> float:
    """The largest finite absolute value."""
    if tensor.numel() == 0:
        return 0.0
    values = tensor.detach()
    if values.dtype is torch.bool:
        return float(values.any())
    if values.is_floating_point():
        found = [_absolute(piece) for piece in values.reshape(-1).split(_PIECE)]
        if all(largest < float("inf") for largest in found):
            return max(found)
    if values.is_floating_point() or values.is_complex():
        values = values.abs()[values.isfinite()]
    return values.abs().max().item() if values.numel() else 0.0


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest finite difference, or an infinite one."""
    largest = 0.0
    pieces = zip(*(tensor.detach().reshape(-1).split(_PIECE) for tensor in (one, other)), strict=True)
    for a, b in pieces:
        found = _absolute(a - b)
        if not found < float("inf"):
            return float("inf")
        largest = max(largest, found)
    return largest


def _absolute(piece: torch.Tensor) -> float:
    """The largest absolute value of floats; NaN where one is."""
    if not piece.numel():
        return 0.0
    least, most = torch.aminmax(piece)
    return max(most.item(), -least.item())


def _relative(right: torch.Tensor, judged: torch.Tensor, scale: float) -> float:
    """The largest difference over `scale`; infinite where only one of the two is finite."""
    if right.is_floating_point() and (largest := _distance(right, judged)) < float("inf"):
        return largest / scale if scale else float("inf") if largest else 0.0
    return _difference(right, judged, scale, only=True)[0]


def _difference(right: torch.Tensor, judged: torch.Tensor, least: float, only: bool = False) -> tuple[float, int]:
    """The largest difference relative to the largest value, or to `least`, and where it is.

    It is infinite where only one of the two is finite.

    Args:
        right: torch's values.
        judged: Those of the executable.
        least: What differences are relative to, if the largest value is smaller.
        only: Whether they are relative to `least` in any case.
    """
    if right.numel() == 0:
        return 0.0, 0
    wide = torch.complex128 if right.is_complex() else torch.float64
    one, other = right.detach().to(wide).flatten(), judged.detach().to(wide).flatten()
    same = (one == other) | (one.isnan() & other.isnan())
    difference = torch.where(same, 0.0, (one - other).abs().nan_to_num(nan=float("inf"), posinf=float("inf")))
    scale = least if only else max(_largest(one), least)
    place = int(difference.argmax())
    largest = difference[place].item()
    if largest == 0.0:
        return 0.0, place
    return (largest / scale if scale else float("inf")), place


def _at(tensor: torch.Tensor, place: int) -> float:
    value = tensor.flatten()[place].item()
    return abs(value) if isinstance(value, complex) else float(value)
