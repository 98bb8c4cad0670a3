"""Arrays that XLA owns, and the addresses of their buffers."""

import functools

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding


def placed_array(values: np.ndarray | jax.Array, sharding: Sharding) -> jax.Array:
    """An array of several devices: a copy of host values, or the array itself, moved if it is placed otherwise."""
    if not sharding.is_fully_addressable:
        return _of_this_worker(values, sharding)
    if isinstance(values, jax.Array):
        if values.sharding.is_equivalent_to(sharding, values.ndim):
            return values
    else:
        values = np.array(values, order="C", copy=True)
    with jax.enable_x64(True):
        return jax.device_put(values, sharding)


def placed_arrays(arrays: tuple, shardings: tuple) -> tuple:
    """Inputs of a program, brought where it wants them; `arrays` stay valid."""
    if not shardings or shardings[0].is_fully_addressable:
        with jax.enable_x64(True):
            return jax.device_put(arrays, shardings)
    return tuple(
        array if isinstance(array, np.ndarray) else _of_this_worker(array, sharding)
        for array, sharding in zip(arrays, shardings, strict=True)
    )


def _of_this_worker(values: np.ndarray | jax.Array, sharding: Sharding) -> jax.Array:
    """This process's part of an array that every process has a part of; `values` are the whole of it, or just so."""
    if isinstance(values, jax.Array) and not values.is_fully_addressable:
        if values.sharding == sharding or values.sharding.is_equivalent_to(sharding, values.ndim):
            return values
        assert values.is_fully_replicated, "parts of an array are gathered by all workers together"
        values = values.addressable_data(0)
    if not sharding.is_fully_replicated:
        (part,) = sharding.addressable_devices_indices_map(values.shape).values()
        values, shape = np.ascontiguousarray(np.asarray(values)[part]), values.shape
    else:
        shape = values.shape
    if isinstance(values, np.ndarray):
        values = owned_array(values)
    return jax.make_array_from_single_device_arrays(shape, sharding, [values])


@functools.cache
def own_device() -> Sharding:
    """The one local device, as a place for arrays."""
    return SingleDeviceSharding(jax.local_devices()[0])


def owned_array(values: np.ndarray | jax.Array) -> jax.Array:
    """Copies values into a buffer that XLA owns, so that donating it updates it in place.

    On a CPU `jax.device_put` keeps pointing at a well-aligned NumPy array, whatever `may_alias` says, and XLA copies a
    donated buffer that it does not own. Between two JAX arrays `may_alias=False` does copy.

    Args:
        values: Any shape and dtype.

    Returns:
        An array of the same shape and dtype on the default device, sharing no memory with `values`.
    """
    with jax.enable_x64(True):
        array = jax.device_put(values)
        device = next(iter(array.devices()))
        if device.platform == "cpu" or isinstance(values, jax.Array):
            array = jax.device_put(array, device, may_alias=False)
    array.block_until_ready()
    return array


def snapshot(values: np.ndarray) -> jax.Array:
    """An array that holds `values` as they are now, whatever happens to their memory later."""
    with jax.enable_x64(True):
        return jax.device_put(np.array(values, order="C", copy=True))


def address(array: jax.Array) -> int:
    """Where the array's buffer lies, in bytes; the array must live on one device of this process."""
    if not array.is_fully_addressable:
        array = array.addressable_data(0)
    return array.unsafe_buffer_pointer()
