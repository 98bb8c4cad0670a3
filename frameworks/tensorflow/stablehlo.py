"""A StableHLO module that another framework has written, as a function that JAX can trace and compile."""

import hashlib
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import func

from trainingcompiler.frameworks.tensorflow import philox
from trainingcompiler.targets import target as targets

_ALIASES = "mhlo.input_output_alias"


@dataclass(frozen=True, kw_only=True, eq=False)
class Module:
    """A module whose `main` takes and returns arrays of known shapes.

    Attributes:
        name: What its entry function is called in the program that it becomes part of.
        text: The module, as MLIR bytecode in the StableHLO dialect.
        results: Shape and dtype of every array that it returns.
    """

    name: str
    text: bytes
    results: tuple[tuple[tuple[int, ...], np.dtype], ...]


@dataclass(frozen=True, kw_only=True)
class Described:
    """What a module says of itself.

    Attributes:
        aliases: Which result of `main` replaces which of its parameters, by number.
        shapes: Of the results of `main`; None for one that is not known before the program runs.
        digest: Equal for modules that differ in nothing but names: TensorFlow counts layers and functions up, so that
            the same model made again has others.
    """

    aliases: dict[int, int]
    shapes: tuple[tuple[int, ...] | None, ...]
    digest: str


def described(text: bytes) -> Described:
    """Reads a module."""
    with mlir.make_ir_context():
        module = ir.Module.parse(text)
        main: Any = ir.SymbolTable(module.operation)["main"]
        results = [ir.RankedTensorType(result) for result in main.type.results]
        shapes = tuple(tuple(result.shape) if result.has_static_shape else None for result in results)
        found = {}
        if _ALIASES in module.operation.attributes:
            for item in ir.ArrayAttr(module.operation.attributes[_ALIASES]):
                entry = ir.DictAttr(item)
                parameter = ir.IntegerAttr(ir.DictAttr(entry["alias"])["parameter_number"]).value
                found[ir.DenseI64ArrayAttr(entry["output_index"])[0]] = parameter
        written = str(module.operation.get_asm(enable_debug_info=False, large_elements_limit=None))
    return Described(aliases=found, shapes=shapes, digest=hashlib.sha256(_without_names(written).encode()).hexdigest())


_SYMBOL = re.compile(r'@(?:"[^"]*"|[\w.$-]+)')


def _without_names(text: str) -> str:
    """The text with its functions numbered in the order in which they appear."""
    names: dict[str, str] = {"@main": "@main"}
    return _SYMBOL.sub(lambda found: names.setdefault(found[0], f"@{len(names)}"), text)


def call(module: Module, arrays: tuple) -> tuple:
    """Calls a module inside a function that `jax.jit` traces; `arrays` are `main`'s parameters, in order."""
    return tuple(_module_p.bind(*arrays, module=module))


_module_p = Primitive("stablehlo_module")
_module_p.multiple_results = True


@_module_p.def_abstract_eval
def _results(*_: ShapedArray, module: Module) -> list[ShapedArray]:
    return [ShapedArray(shape, dtype) for shape, dtype in module.results]


def _lower(context: mlir.LoweringRuleContext, *values: ir.Value, module: Module) -> list[ir.Value]:
    source = ir.Module.parse(module.text)
    _drop_copies(source.operation)
    target = targets.current()
    if target is None or target.platform == "cpu":
        philox.replace(source)
    main: Any = ir.SymbolTable(source.operation)["main"]
    types = main.type.results
    surroundings = context.module_context
    name = mlir.merge_mlir_modules(surroundings.module, module.name, source, dst_symtab=surroundings.symbol_table)
    return list(func.CallOp(types, ir.FlatSymbolRefAttr.get(name), values).results)


mlir.register_lowering(_module_p, _lower)


def _drop_copies(operation: ir.Operation) -> None:
    """Replaces every `mhlo.copy`, which XLA's GPU path refuses, by what it copies: values here are immutable."""
    for region in operation.regions:
        for block in region.blocks:
            for inner in list(block.operations):
                _drop_copies(inner.operation)
                if inner.operation.name == "mhlo.copy":
                    inner.operation.results[0].replace_all_uses_with(inner.operation.operands[0])
                    inner.operation.erase()
