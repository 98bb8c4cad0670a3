"""What changes with the batch size: a recipe in, the recipe of another batch size out, with the rule and its source.

The default changes nothing about the training: a larger batch on each device, fewer accumulation steps. If the global
batch grows by a factor k, the learning rate follows a published rule, and everything that counts steps or decays with
them (warm-up, length, weight decay, moving averages) is carried along, so that it means the same number of samples.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from trainingcompiler.config import did_you_mean
from trainingcompiler.errors import ConfigError, UsageError

Policy = Literal["auto", "linear", "sqrt", "adam", "none"]
POLICIES = ("auto", "linear", "sqrt", "adam", "none")

_LINEAR = ("SGD", "ASGD", "SGDW")
_ADAM = ("Adam", "AdamW", "NAdam", "RAdam", "AdamP", "AMSGrad")
_ADAPTIVE = (*_ADAM, "Adamax", "Adagrad", "Adadelta", "RMSprop", "LAMB", "Lamb", "Adafactor")
_DECOUPLED = ("AdamW", "SGDW", "LAMB", "Lamb", "AdamP")
_WARM_UP = 0.05  # of all steps, where a rule asks for a warm-up and the recipe has none

SOURCES = {
    "linear": "Goyal et al. 2017, arXiv:1706.02677",
    "sqrt": "Krizhevsky 2014, arXiv:1404.5997; for adaptive methods Malladi et al. 2022, arXiv:2205.10287",
    "adam": "Malladi et al. 2022, arXiv:2205.10287",
    "weight decay": "Wang and Aitchison 2024, arXiv:2405.13698",
    "moving average": "Busbridge et al. 2023, arXiv:2307.13813",
}
"""Rule -> where it comes from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What of a training run depends on its batch size.

    Attributes:
        batch_size: Rows that one device computes at once.
        accumulation_steps: Batches whose gradients are added up for one step.
        world_size: Devices that compute batches of their own.
        optimizer: The name of its class, such as `"AdamW"`.
        lr: The peak learning rate.
        betas: Of Adam and its kin.
        epsilon: Likewise.
        weight_decay: As the optimizer is given it.
        ema_decay: Of a moving average of the weights, each step.
        warmup_steps: Optimizer steps until the peak.
        total_steps: Optimizer steps of the whole run, if that is known.

    Raises:
        ConfigError: Values that no training can have; all mistakes together.
    """

    batch_size: int
    accumulation_steps: int = 1
    world_size: int = 1
    optimizer: str = "AdamW"
    lr: float
    betas: tuple[float, float] | None = None
    epsilon: float | None = None
    weight_decay: float = 0.0
    ema_decay: float | None = None
    warmup_steps: int = 0
    total_steps: int | None = None

    def __post_init__(self) -> None:
        mistakes = [
            f"{name}={getattr(self, name)!r}: must be a whole number, {least} or more"
            for name, least in (("batch_size", 1), ("accumulation_steps", 1), ("world_size", 1), ("warmup_steps", 0))
            if type(getattr(self, name)) is not int or getattr(self, name) < least
        ]
        if not 0 < self.lr < math.inf:
            mistakes.append(f"lr={self.lr!r}: must be a number above 0")
        for name, decays in (("betas", self.betas or ()), ("ema_decay", (self.ema_decay,))):
            if any(decay is not None and not 0 <= decay < 1 for decay in decays):
                mistakes.append(f"{name}={getattr(self, name)!r}: must be from 0 up to, and without, 1")
        if self.total_steps is not None and self.total_steps < max(1, self.warmup_steps):
            mistakes.append(f"total_steps={self.total_steps}: must be 1 or more, and no less than the warm-up")
        if mistakes:
            raise ConfigError(mistakes)

    @property
    def global_batch_size(self) -> int:
        """Rows behind one optimizer step: every device and every accumulated batch counted, each once."""
        return self.batch_size * self.accumulation_steps * self.world_size


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaled:
    """A recipe for another batch size.

    Attributes:
        before: What it was.
        recipe: What it is now.
        policy: The rule for the learning rate: "keep-global", "linear", "sqrt", "adam" or "none".
        factor: By how much the global batch has grown.
        because: Why this rule.
        remarks: What a person ought to know besides.
    """

    before: Recipe
    recipe: Recipe
    policy: str
    factor: float
    because: str
    remarks: tuple[str, ...] = ()

    def changes(self) -> dict[str, tuple]:
        """Field -> its old and its new value, for those that differ."""
        pairs = {
            field.name: (getattr(self.before, field.name), getattr(self.recipe, field.name))
            for field in dataclasses.fields(Recipe)
        }
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def describe(self) -> str:
        """One line for the rule, one for each change, one for each remark."""
        batch = f"global batch {self.before.global_batch_size} -> {self.recipe.global_batch_size}"
        lines = [f"{self.policy} ({self.because}); {batch}"]
        lines += [f"  {name}: {_shown(old)} -> {_shown(new)}" for name, (old, new) in self.changes().items()]
        return "\n".join([*lines, *(f"  {remark}" for remark in self.remarks)])


def keep_global(recipe: Recipe, *, batch_size: int, world_size: int | None = None) -> Scaled:
    """The same training with another batch on each device: accumulation makes up for it.

    Args:
        recipe: What the run is like now.
        batch_size: Rows that one device is to compute at once.
        world_size: Devices; None leaves their number.

    Returns:
        The new recipe; its global batch, and so everything else, is the old one's.

    Raises:
        UsageError: The global batch is not a whole number of such batches; those near by that are possible are named.
    """
    devices = recipe.world_size if world_size is None else world_size
    rows = recipe.global_batch_size
    new = dataclasses.replace(recipe, batch_size=batch_size, world_size=devices)
    if rows % (batch_size * devices):
        sizes = [n for n in range(1, rows // devices + 1) if rows % (n * devices) == 0]
        below = max((n for n in sizes if n < batch_size), default=None)
        above = min((n for n in sizes if n > batch_size), default=None)
        near = " or ".join(str(n) for n in (below, above) if n is not None)
        raise UsageError(
            f"a global batch of {rows} cannot be made of batches of {batch_size} on {devices} "
            f"device{'s' * (devices > 1)}: "
            + (f"take {near}, or let the global batch change" if near else "take fewer devices")
        )
    return Scaled(
        before=recipe,
        recipe=dataclasses.replace(new, accumulation_steps=rows // (batch_size * devices)),
        policy="keep-global",
        factor=1.0,
        because="the global batch stays, so the training is the same",
    )


def keep_global_sizes(recipe: Recipe) -> list[int]:
    """The batches on one device, from the own one on, of which the global batch is a multiple; the largest last."""
    share = recipe.batch_size * recipe.accumulation_steps
    return [size for size in range(recipe.batch_size, share + 1) if share % size == 0]


def rescale(
    recipe: Recipe,
    *,
    batch_size: int | None = None,
    accumulation_steps: int | None = None,
    world_size: int | None = None,
    policy: Policy = "auto",
) -> Scaled:
    """The recipe for a global batch that is k times as large.

    * `linear`: lr x k, with a gradual warm-up (Goyal et al. 2017). For SGD.
    * `sqrt`: lr x sqrt(k). For adaptive methods.
    * `adam`: lr x sqrt(k), 1 - beta x k for both betas, epsilon / sqrt(k): the rule that keeps Adam's trajectory
      (Malladi et al. 2022).
    * `none`: the learning rate stays.

    All but `none` also carry along a decoupled weight decay, so that lr x decay x steps stays (Wang and Aitchison
    2024); an L2 penalty is part of the gradient and stays. Steps are divided by k, and a moving average's decay is
    raised to the power of k (Busbridge et al. 2023), under every policy: both count steps.

    Args:
        recipe: What the run is like now.
        batch_size: Rows that one device is to compute at once; None leaves it, as for the next two.
        accumulation_steps: Batches for a step.
        world_size: Devices.
        policy: The rule; `"auto"` takes the one for the optimizer's class.

    Returns:
        The new recipe, the rule, and why it was taken.

    Raises:
        ConfigError: The policy, or a size, is none.
        UsageError: `"auto"` does not know the optimizer, or the rule has no solution for so large a step.
    """
    if policy not in POLICIES:
        hint = did_you_mean(str(policy), POLICIES)
        raise ConfigError([f"policy={policy!r}: must be one of {', '.join(POLICIES)}{hint}"])
    grown = dataclasses.replace(
        recipe,
        batch_size=recipe.batch_size if batch_size is None else batch_size,
        accumulation_steps=recipe.accumulation_steps if accumulation_steps is None else accumulation_steps,
        world_size=recipe.world_size if world_size is None else world_size,
    )
    factor = grown.global_batch_size / recipe.global_batch_size
    chosen, because = (policy, "asked for") if policy != "auto" else _choose(recipe.optimizer)
    scaled = _RULES[chosen](grown, factor)
    if chosen != "none" and recipe.optimizer in _DECOUPLED and recipe.weight_decay:
        decay = recipe.weight_decay * factor * recipe.lr / scaled.lr
        scaled = dataclasses.replace(scaled, weight_decay=decay)
    if recipe.ema_decay is not None:
        scaled = dataclasses.replace(scaled, ema_decay=recipe.ema_decay**factor)
    scaled, remarks = _with_steps(recipe, scaled, factor, wants_warmup=chosen == "linear" and factor > 1)
    source = f"{because}; {SOURCES[chosen]}" if chosen in SOURCES else because
    return Scaled(before=recipe, recipe=scaled, policy=chosen, factor=factor, because=source, remarks=tuple(remarks))


def _choose(optimizer: str) -> tuple[str, str]:
    if optimizer in _LINEAR:
        return "linear", f"{optimizer} follows the gradient's size"
    if optimizer in _ADAPTIVE:
        return "sqrt", f"{optimizer} divides by the gradient's noise"
    raise UsageError(
        f"no rule is known for the optimizer {optimizer}: choose the policy yourself, linear if its update is "
        "proportional to the gradient, sqrt if it divides by the gradient's size, or none"
    )


def _linear(recipe: Recipe, factor: float) -> Recipe:
    return dataclasses.replace(recipe, lr=recipe.lr * factor)


def _sqrt(recipe: Recipe, factor: float) -> Recipe:
    return dataclasses.replace(recipe, lr=recipe.lr * math.sqrt(factor))


def _adam(recipe: Recipe, factor: float) -> Recipe:
    if recipe.optimizer not in _ADAM or recipe.betas is None or recipe.epsilon is None:
        raise UsageError(
            f"the policy adam scales betas and epsilon of Adam and its kin, and this is {recipe.optimizer} with "
            f"betas={recipe.betas}, epsilon={recipe.epsilon}: give them, or take the policy sqrt"
        )
    betas = tuple(1 - factor * (1 - beta) for beta in recipe.betas)
    if min(betas) < 0:
        most = min(1 / (1 - beta) for beta in recipe.betas)
        raise UsageError(
            f"a batch {factor:g} times as large would need betas of {', '.join(f'{beta:g}' for beta in betas)}: with "
            f"betas={recipe.betas} the policy adam goes up to {most:g} times; take sqrt, or a smaller batch"
        )
    root = math.sqrt(factor)
    return dataclasses.replace(recipe, lr=recipe.lr * root, betas=(betas[0], betas[1]), epsilon=recipe.epsilon / root)


_RULES: dict[str, Callable[[Recipe, float], Recipe]] = {
    "linear": _linear,
    "sqrt": _sqrt,
    "adam": _adam,
    "none": lambda recipe, factor: recipe,
}


def _with_steps(before: Recipe, scaled: Recipe, factor: float, wants_warmup: bool) -> tuple[Recipe, list[str]]:
    """Divides what counts steps by the factor, so that it means the same number of samples."""
    remarks = []
    total = None if before.total_steps is None else math.ceil(before.total_steps / factor)
    warmup = math.ceil(before.warmup_steps / factor)
    if wants_warmup and not warmup:
        if total is None:
            remarks.append("give the run a warm-up: the linear rule needs one (5 epochs in its paper)")
        else:
            warmup = math.ceil(total * _WARM_UP)
            remarks.append(f"a warm-up of {_WARM_UP:.0%} of the steps is added: the linear rule needs one")
    if total is not None:
        warmup = min(warmup, total)
    return dataclasses.replace(scaled, warmup_steps=warmup, total_steps=total), remarks


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_shown, value))})"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
