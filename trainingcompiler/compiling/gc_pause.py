"""Python's garbage collector, at rest while very many objects are made that stay."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """Keeps the collector from running inside the block, in all threads; it is as it was afterwards.

    Importing JAX and capturing a step make some 100,000 objects, nearly none of them garbage, and each round over all
    objects also visits those of the framework and the script: beside torch and transformers, importing JAX takes 0.4 s
    with the collector and 0.19 s without. For blocks of seconds, as garbage of other threads waits as well.
    """
    if not gc.isenabled():  # whoever turned it off turns it on
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
