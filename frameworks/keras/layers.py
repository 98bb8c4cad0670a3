"""Which dim of each variable of a Keras model devices that share a layer divide; see `tensor_parallel`."""

from typing import Any

from trainingcompiler.parallel.layer_rules import FAMILIES, Rules, Side, side_of

_ATTENTION: Rules = {  # keras.layers.MultiHeadAttention, whose kernels are (features, heads, size) and back
    "*attention*/query": "column",
    "*attention*/key": "column",
    "*attention*/value": "column",
    "*attention*/attention_output": "row",
}


def tensor_dims(model: Any) -> dict[int, int]:
    """The divided dim of a model's variables and of the optimizer's slots that belong to them.

    Args:
        model: Built, and with its optimizer built.

    Returns:
        Identity of a `tf.Variable` -> dim; those that each device has whole are left out.
    """
    dims: dict[int, int] = {}
    prefixes: dict[str, tuple[tuple, int]] = {}
    for variable in model.trainable_variables:
        layer, _, kind = variable.path.rpartition("/")
        side = side_of(layer, {**_ATTENTION, **FAMILIES})
        dim = None if side is None else _dim(kind, side, len(variable.shape))
        if dim is not None:
            dims[id(variable.value)] = dim
            prefixes[variable.path.replace("/", "_") + "_"] = tuple(variable.shape), dim
    for slot in model.optimizer.variables:
        # Keras names the moments of "dense/kernel" "adam/dense_kernel_momentum".
        name = slot.path.rpartition("/")[2]
        owner = max((prefix for prefix in prefixes if name.startswith(prefix)), key=len, default=None)
        if owner is not None and prefixes[owner][0] == tuple(slot.shape):
            dims[id(slot.value)] = prefixes[owner][1]
    return dims


def _dim(kind: str, side: Side, rank: int) -> int | None:
    if kind == "bias":
        return 0 if side == "column" else None
    return 1 if side == "column" and rank > 1 else 0
