"""What the tests of the caches share."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from trainingcompiler.cache import jax_cache
from trainingcompiler.reporting import events

OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture
def jax_options():
    """Every test begins and ends with JAX's cache as it was."""
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    jax_cache.enable_persistent_cache(None, 0)
    jax_cache._switched_off = False
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    jax.clear_caches()


@pytest.fixture
def seen():
    collected: list[events.Event] = []
    unsubscribe = events.subscribe(collected.append)
    yield collected
    unsubscribe()
