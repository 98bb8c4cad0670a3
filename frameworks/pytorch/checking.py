"""Checks a compiled step against torch: the captured graph, replayed operator by operator on the same values.

Random operators take the executable's own numbers: torch's generator is another one. Everything else is torch's.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import torch

from trainingcompiler.frameworks.pytorch.arrays import tensor_of
from trainingcompiler.frameworks.pytorch.graph import BARRIER, Node, Ref, references
from trainingcompiler.frameworks.pytorch.inspection import Inspection
from trainingcompiler.frameworks.pytorch.lowering import lower
from trainingcompiler.frameworks.pytorch.recorder import HIDDEN_WRITES

# One operator, on equal inputs: sums of 10^4 terms in another order. A whole step may amplify that ten times.
OPERATOR_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
STEP_FACTOR = 10.0
_NOTHING = 1e-3  # of the step's largest value: a result below it consists of rounding
_CANCELLED = 1e-2  # of an operator's largest input, likewise


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


@dataclass(kw_only=True, slots=True)
class Verdict:
    """What a check of one step has found.

    Attributes:
        compared: How many tensors of the step's results were compared.
        operators: How many operators the graph has.
        largest: The largest relative difference of a result, and the result's name.
        over: Results beyond their tolerance.
        first: The first operator at fault; None if no operator is, so that `over` is accumulated rounding.
    """

    compared: int = 0
    operators: int = 0
    largest: tuple[float, str] = (0.0, "")
    over: list[str] = field(default_factory=list)
    first: Difference | None = None


def check(inspection: Inspection) -> Verdict:
    """Replays the graph in torch, compares the results, and looks for the first operator at fault.

    Args:
        inspection: One run of the program.

    Returns:
        What was found. The search compiles the graph again, with every value as a result, so that each operator can
        be given the executable's own inputs.
    """
    wanted = list(inspection.results)
    nodes = inspection.graph.live_nodes(wanted)
    verdict = Verdict(compared=len(wanted), operators=len(nodes))
    every = _every_value(inspection, nodes)
    replayed = _replay(inspection, nodes, every)
    largest = max((_largest(replayed[number]) for number in wanted), default=0.0)
    for number in wanted:
        right, judged = replayed[number], _tensor(inspection.results[number])
        relative = _difference(right, judged, _NOTHING * largest)[0]
        if relative >= verdict.largest[0]:
            verdict.largest = (relative, inspection.names.get(number, "a result"))
        if relative > STEP_FACTOR * OPERATOR_TOLERANCES.get(right.dtype, 0.0):
            verdict.over.append(inspection.names.get(number, "a result"))
    verdict.first = _first_difference(inspection, nodes, every)
    return verdict


def _replay(inspection: Inspection, nodes: list[Node], every: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    values = {number: _tensor(array) for number, array in inspection.inputs.items()} | dict(inspection.graph.constants)
    for node in nodes:
        if node.seed is not None:
            values.update({number: every[number] for number in node.outputs if number is not None})
        else:
            values.update(run_node(node, values))
    return values


def _first_difference(inspection: Inspection, nodes: list[Node], every: dict[int, torch.Tensor]) -> Difference | None:
    for node in nodes:
        if node.seed is not None or node.operator.startswith(("aten.empty", "aten.new_empty")):
            continue
        for number, right in run_node(node, every).items():
            judged = every[number]
            # Sums cancel: the gradient of a bias before BatchNorm is nothing but the rounding of its summands.
            given = max((_largest(every[read]) for read in references(node)), default=0.0)
            relative, place = _difference(right, judged, _CANCELLED * given)
            if relative > OPERATOR_TOLERANCES.get(right.dtype, 0.0):
                return Difference(
                    operator=node.operator,
                    where=node.where,
                    relative=relative,
                    torchs=float(right.flatten()[place]),
                    compiled=float(judged.flatten()[place]),
                )
    return None


def _every_value(inspection: Inspection, nodes: list[Node]) -> dict[int, torch.Tensor]:
    numbers = [number for node in nodes for number in node.outputs if number is not None]
    given = list(inspection.inputs)
    function = lower(inspection.graph, numbers)
    with jax.enable_x64(True):
        arrays = jax.jit(lambda *values: function(dict(zip(given, values, strict=True))))(*inspection.inputs.values())
    every = {number: tensor_of(array) for number, array in zip(numbers, arrays, strict=True)}
    every |= {number: _tensor(array) for number, array in inspection.inputs.items()}
    return every | dict(inspection.graph.constants)


def run_node(node: Node, values: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """Runs one operator of a graph in torch.

    Args:
        node: The operator, not a random one.
        values: Its inputs, by number; they are not written to.

    Returns:
        Its outputs, by number.
    """
    args, kwargs = _decode(node.args, values), {k: _decode(v, values) for k, v in node.kwargs.items()}
    if node.operator.startswith("inverse:"):
        parent, child, *rest = args
        whole = parent.clone(memory_format=torch.contiguous_format)
        _overload(node.operator.removeprefix("inverse:"))(whole, *rest, **kwargs).copy_(child)
        results = [whole]
    elif node.operator == BARRIER:
        results = list(args)
    else:
        if "._fused_" in node.operator:  # the table's own spelling takes hyperparameters as tensors
            kwargs = {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        hidden = [args[position] for position in HIDDEN_WRITES.get(node.operator, ())]
        results = [*_leaves(_overload(node.operator)(*args, **kwargs)), *hidden]
    outputs = {}
    for number, meta, result in zip(node.outputs, node.metas, results, strict=False):
        if number is not None and isinstance(result, torch.Tensor):
            outputs[number] = result.to(meta[1]) if meta is not None and node.casts else result
    return outputs


def _overload(name: str) -> Callable:
    namespace, packet, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)


def _decode(argument: Any, values: dict[int, torch.Tensor]) -> Any:
    if isinstance(argument, Ref):
        return values[argument.id].clone()  # some operators write to what they are given
    if isinstance(argument, list | tuple):
        return [_decode(item, values) for item in argument]
    return argument


def _leaves(result: Any) -> list[Any]:
    if isinstance(result, list | tuple):
        return [leaf for item in result for leaf in _leaves(item)]
    return [result]


def _tensor(array: np.ndarray) -> torch.Tensor:
    with jax.enable_x64(True):
        return tensor_of(jax.numpy.asarray(array)).clone()


def _largest(tensor: torch.Tensor) -> float:
    values = tensor.detach().double().abs()
    values = values[values.isfinite()]
    return values.max().item() if values.numel() else 0.0


def _difference(right: torch.Tensor, judged: torch.Tensor, least: float) -> tuple[float, int]:
    """The largest difference relative to the largest value, or to `least`, and where it is.

    It is infinite where only one of the two is finite.
    """
    if right.numel() == 0:
        return 0.0, 0
    one, other = right.detach().double().flatten(), judged.detach().double().flatten()
    same = (one == other) | (one.isnan() & other.isnan())
    difference = torch.where(same, 0.0, (one - other).abs().nan_to_num(nan=float("inf")))
    scale = max(_largest(one), least)
    place = int(difference.argmax())
    largest = difference[place].item()
    if largest == 0.0:
        return 0.0, place
    return (largest / scale if scale else float("inf")), place
