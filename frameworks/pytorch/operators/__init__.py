"""The operator table: every ATen overload that a training step may contain, written in JAX, one module a family."""

import importlib
import pkgutil

from trainingcompiler.frameworks.pytorch.operators.registry import FAKES as FAKES
from trainingcompiler.frameworks.pytorch.operators.registry import LOWERINGS as LOWERINGS
from trainingcompiler.frameworks.pytorch.operators.registry import RANDOM_LOWERINGS as RANDOM_LOWERINGS
from trainingcompiler.frameworks.pytorch.operators.registry import VIEW_INVERSES as VIEW_INVERSES

for _family in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_family.name}")
