"""What a person calls the tensors of a step."""

import inspect
import weakref

from torch import nn

from trainingcompiler.frameworks.pytorch.capture.capture import LiftedTensor
from trainingcompiler.frameworks.pytorch.tape.entries import Entry, Input


def written_names(entries: list[Entry], written: list[LiftedTensor]) -> dict[int, str]:
    """What a person calls the values that a step leaves in its state."""
    known = tensor_names(entries)
    return {item.new_value: f"new {known[id(item.tensor())]}" for item in written if id(item.tensor()) in known}


def gradient_names(entries: list[Entry], gradients: list[tuple[weakref.ref, int]]) -> dict[int, str]:
    """What a person calls the values of gradients that a step stores."""
    known = tensor_names(entries)
    return {value: f"gradient of {known.get(id(parameter()), 'a parameter')}" for parameter, value in gradients}


def tensor_names(entries: list[Entry]) -> dict[int, str]:
    """What a person calls the tensors of the models and of the optimizers' state, by identity."""
    modules = {id(module): module for entry in entries for module in entry.modules}.values()
    known = {id(t): name for module in modules for name, t in (*module.named_parameters(), *module.named_buffers())}
    of_state = {
        id(value): f"{key} of {known.get(id(parameter), 'a parameter')}"
        for entry in entries
        for optimizer in entry.optimizers
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }
    return known | of_state


def leaf_name(entry: Entry, place: int) -> str:
    """What the user calls a leaf: the parameter of `forward`, or the key it was passed under."""
    leaf = entry.leaves[place]
    if isinstance(leaf, Input) and leaf.origin is not None:
        module, name = leaf.origin
        if isinstance(name, int):
            parameters = list(inspect.signature(module.forward).parameters)
            name = parameters[name] if name < len(parameters) else f"argument {name}"
        return f"{name} of {type(module).__name__}"
    args, kwargs = entry.structure.children
    names: list[str] = []
    function = entry.function.forward if isinstance(entry.function, nn.Module) else entry.function
    try:
        parameters = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        parameters = []
    for index, child in enumerate(args.children):
        base = parameters[index] if index < len(parameters) else f"argument {index}"
        names += [base] * _leaf_count(child)
    for key, child in zip(kwargs.keys, kwargs.children, strict=True):
        names += [str(key)] * _leaf_count(child)
    called = (
        type(entry.function).__name__
        if isinstance(entry.function, nn.Module)
        else getattr(entry.function, "__name__", str(entry.function))
    )
    return f"{names[place]} of {called}"


def _leaf_count(structure) -> int:
    return 1 if structure.kind is None else sum(map(_leaf_count, structure.children))
