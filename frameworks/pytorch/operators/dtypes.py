"""torch dtypes and their JAX counterparts."""

import jax.numpy as jnp
import torch

JAX_DTYPES: dict[torch.dtype, jnp.dtype] = {
    torch.bool: jnp.dtype("bool"),
    torch.uint8: jnp.dtype("uint8"),
    torch.int8: jnp.dtype("int8"),
    torch.int16: jnp.dtype("int16"),
    torch.int32: jnp.dtype("int32"),
    torch.int64: jnp.dtype("int64"),
    torch.float16: jnp.dtype("float16"),
    torch.bfloat16: jnp.dtype("bfloat16"),
    torch.float32: jnp.dtype("float32"),
    torch.float64: jnp.dtype("float64"),
    torch.complex64: jnp.dtype("complex64"),
    torch.complex128: jnp.dtype("complex128"),
}
TORCH_DTYPES: dict[jnp.dtype, torch.dtype] = {jax: torch_ for torch_, jax in JAX_DTYPES.items()}


def jax_dtype(dtype: torch.dtype) -> jnp.dtype:
    """The JAX dtype that stores the same values as `dtype`."""
    return JAX_DTYPES[dtype]


def torch_dtype(array) -> torch.dtype:
    """The torch dtype of a JAX array."""
    return TORCH_DTYPES[jnp.dtype(array.dtype)]


def result_dtype(*operands) -> jnp.dtype:
    """torch's type promotion: dims beat 0-d tensors, tensors beat Python numbers, whatever the widths.

    Args:
        *operands: JAX arrays (0-d arrays count as torch's 0-d tensors) and Python numbers.

    Returns:
        The dtype torch would compute in; `torch.result_type` extended to many operands.
    """
    return jax_dtype(promote(*operands))


def promote(*operands) -> torch.dtype:
    """`result_dtype` as a torch dtype.

    The three priority groups of c10/core/TensorImpl's `ResultTypeState`: the result is that of the highest category
    among tensors with dims, unless a lower-priority group (0-d tensors, then numbers) has a higher *category*.
    """
    dims, zeros, numbers = None, None, None
    for operand in operands:
        if isinstance(operand, bool | int | float | complex):
            default = torch.get_default_dtype()
            kind = (
                torch.bool
                if isinstance(operand, bool)
                else torch.int64
                if isinstance(operand, int)
                else default
                if isinstance(operand, float)
                else (torch.complex128 if default == torch.float64 else torch.complex64)
            )
            numbers = kind if numbers is None else torch.promote_types(numbers, kind)
        elif operand.ndim == 0:
            kind = torch_dtype(operand)
            zeros = kind if zeros is None else torch.promote_types(zeros, kind)
        else:
            kind = torch_dtype(operand)
            dims = kind if dims is None else torch.promote_types(dims, kind)
    result = dims
    for group in (zeros, numbers):
        if group is None:
            continue
        if result is None or _category(group) > _category(result):
            result = group if result is None else torch.promote_types(result, group)
    assert result is not None
    return result


def _category(dtype: torch.dtype) -> int:
    if dtype.is_complex:
        return 3
    if dtype.is_floating_point:
        return 2
    return 0 if dtype == torch.bool else 1
