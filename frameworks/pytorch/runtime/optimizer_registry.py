"""What is known of the script's optimizers: whom they train, what happens to gradients after a step."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from trainingcompiler.errors import GradientNotKeptError
from trainingcompiler.frameworks.pytorch.capture import optimizer_init, optimizers
from trainingcompiler.frameworks.pytorch.interop.gradients import store_gradient
from trainingcompiler.planning import planner


class OptimizerHabits:
    """What a script has been seen to do with one optimizer."""

    def __init__(self):
        self.steps = 0
        self.was_loaded = False  # its state, by the script
        self.was_compiled = False  # any of its steps
        self.begins_in_torch = False  # the first step is torch's, whatever is known of it
        self.clears = False  # sets gradients to None between a step and the next backward
        self.zeroes = False  # fills them with zeros instead
        self.reads = False  # reads them after the step
        self.constants: frozenset = frozenset()


class OptimizerRegistry:
    """The optimizers of the process.

    Attributes:
        keep_gradients: Whether the user asked for every gradient to be stored.
        is_same_batch: Whether the last step followed another one, and no gradient was cleared in between.
    """

    def __init__(self, keep_gradients: bool = False):
        self.keep_gradients = keep_gradients
        self.on_step = lambda optimizer, engine: None
        self._habits: weakref.WeakKeyDictionary[torch.optim.Optimizer, OptimizerHabits] = weakref.WeakKeyDictionary()
        self._owners: dict[int, weakref.ref] = {}
        self._owned_at = -1
        self._changes = 0
        self._consumed: dict[int, weakref.ref] = {}
        self._after_step = self.is_same_batch = False
        self._trained: Any = WeakIdKeyDictionary()  # what is known of a module goes with it

    @property
    def has_stepped(self) -> bool:
        """Whether any optimizer has."""
        return any(habits.steps for habits in self._habits.values())

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimizers that are alive."""
        return list(self._habits)

    def register(self, optimizer: torch.optim.Optimizer) -> None:
        """Notes an optimizer, or that its groups have changed."""
        self.habits(optimizer)
        self._changes += 1

    def habits(self, optimizer: torch.optim.Optimizer) -> OptimizerHabits:
        """What is known of an optimizer, or of the one that an object of a library's stands for, as Fabric's does."""
        known = self._known(optimizer)
        if known is None:
            known = self._habits[optimizer] = OptimizerHabits()
            self._changes += 1
        return known

    def _known(self, optimizer: torch.optim.Optimizer) -> OptimizerHabits | None:
        known = self._habits.get(optimizer)
        if known is not None:
            return known
        groups = getattr(optimizer, "param_groups", None)  # an optimizer of one's own may have none
        for other, habits in self._habits.items():
            if groups is not None and getattr(other, "param_groups", None) is groups:
                return habits
        return None

    def trains(self, module: nn.Module, parameters: list[nn.Parameter]) -> bool:
        """Whether optimizers train a module's parameters, each of which can be captured.

        The first step of an optimizer runs in torch, unless it is known beforehand what it leaves: state, and
        gradients that the script throws away.
        """
        flags = tuple(parameter.requires_grad for parameter in parameters)
        known = self._trained.get(module)
        if known is not None and known[0] is parameters and known[1] == self._changes and known[2] == flags:
            return known[3]
        self._update_owners()
        owners = {id(owner): owner for p in parameters if (owner := self.owner(p)) is not None}
        trained = bool(owners) and all(map(self.is_ready, owners.values()))
        if trained and planner.current is None and any(not self.habits(owner).steps for owner in owners.values()):
            # A gradient that no optimizer clears is there from the second step on: that would be another program.
            trained = all(self.owner(p) is not None for p in parameters if p.requires_grad)
        self._trained[module] = (parameters, self._changes, flags, trained)
        return trained

    def is_ready(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the optimizer's next step can be captured: it has stepped before, or its first step is understood.

        That is so where its state was loaded or can be made ahead, and the script is known to set gradients to None.
        A run that resumes may do so between forward and backward, so that it goes on with the masks that it would have
        had: see `is_undecided`.
        Several optimizers begin in torch: in the first iteration of a GAN one has stepped when the other has not.
        """
        habits = self.habits(optimizer)
        if habits.steps or planner.current is not None:
            return True
        if habits.begins_in_torch or habits.zeroes or len(self._habits) > 1:
            return False
        is_there = all(optimizer.state.get(p) for p in optimizers.parameters_of(optimizer) if p.requires_grad)
        if not habits.clears:
            return habits.was_loaded and is_there
        return is_there or optimizer_init.makes_state(optimizer)

    def is_undecided(self, parameters: Iterable[torch.Tensor]) -> bool:
        """Whether a first step has been recorded, and the script has not set the parameters' gradients to None yet."""
        if planner.current is not None or self.has_stepped:
            return False
        return any(not habits.clears for habits in self._fresh(parameters))

    def begins_in_torch(self, parameters: list[nn.Parameter]) -> bool:
        """Lets torch run the first step of the parameters' optimizers, unless that is past; returns whether it does.

        A first forward may set things up that later ones find: caches, lazy layers, BERT's `config.problem_type`.
        """
        fresh = self._fresh(parameters)
        for habits in fresh:
            habits.begins_in_torch = True
            self._changes += 1
        return bool(fresh)

    def begins(self, parameters: list[nn.Parameter]) -> bool:
        """Whether optimizers of the parameters have not stepped yet."""
        return bool(self._fresh(parameters))

    def _fresh(self, parameters: Iterable[torch.Tensor]) -> list[OptimizerHabits]:
        self._update_owners()
        owners = [self.owner(parameter) for parameter in parameters]
        return [self.habits(owner) for owner in owners if owner is not None and not self.habits(owner).steps]

    def owner(self, parameter: torch.Tensor) -> torch.optim.Optimizer | None:
        """The optimizer that updates a parameter."""
        self._update_owners()
        reference = self._owners.get(id(parameter))
        return None if reference is None else reference()

    def stepped(self, optimizer: torch.optim.Optimizer, engine: str) -> None:
        """Notes a finished `step`."""
        habits = self.habits(optimizer)
        habits.steps += 1
        habits.was_compiled |= engine == "xla"
        if habits.steps == 1:
            self._changes += 1
        self.is_same_batch, self._after_step = self._after_step, True
        self.on_step(optimizer, engine)

    def pattern(self, optimizer: torch.optim.Optimizer) -> tuple:
        """The optimizer's part of a signature."""
        habits = self.habits(optimizer)
        return id(optimizer), self._keeps(optimizer), optimizers.pattern(optimizer, habits.constants)

    def fix_number(self, optimizer: torch.optim.Optimizer, path: tuple) -> bool:
        """Makes a hyperparameter a constant of programs; False if it is one."""
        habits = self.habits(optimizer)
        if path in habits.constants:
            return False
        habits.constants |= {path}
        return True

    # -- gradients ----------------------------------------------------------------------------------------------

    def keeps_gradient(self, parameter: torch.Tensor) -> bool:
        """Whether a step stores the parameter's gradient: unless the script is known to throw it away unread."""
        owner = self.owner(parameter)
        return owner is None or self._keeps(owner)

    def _keeps(self, optimizer: torch.optim.Optimizer) -> bool:
        habits = self.habits(optimizer)
        return self.keep_gradients or not habits.clears or habits.zeroes or habits.reads

    def consume(self, parameters: list[weakref.ref]) -> None:
        """Notes parameters whose gradients a step has used and not stored."""
        for parameter in parameters:
            self._consumed[id(parameter())] = parameter

    def is_consumed(self, parameter: torch.Tensor) -> bool:
        """Whether a step has used the parameter's gradient and not stored it."""
        reference = self._consumed.get(id(parameter))
        return reference is not None and reference() is parameter  # a new one may have the number of one that is gone

    def forget_consumed(self, parameter: torch.Tensor) -> None:
        """Notes that somebody has cleared a gradient that a step had not stored."""
        self._consumed.pop(id(parameter), None)

    def check_unconsumed(self, parameters: Iterable[torch.Tensor]) -> None:
        """Fails before a step is made by gradients that were not stored.

        Args:
            parameters: Whose gradients are about to be used.

        Raises:
            GradientNotKeptError: The script did not clear the gradients, as it used to.
        """
        if self._consumed and any(map(self.is_consumed, parameters)):
            raise GradientNotKeptError(
                "optimizer.step() would use gradients of an earlier step that the compiled step did not keep, "
                "because the script has cleared them after every step so far. Pass --keep-gradients to the launcher, "
                "or TrainingCompilerConfig(keep_gradients=True)."
            )

    def clears_gradients(self, owner: Any, parameters: list[torch.Tensor], set_to_none: bool) -> None:
        """Notes a `zero_grad` of an optimizer, which may be older than we are, or of a module."""
        if isinstance(owner, torch.optim.Optimizer):
            self.habits(owner)
        self._after_step = False
        for optimizer in {id(o): o for p in parameters if (o := self.owner(p)) is not None}.values():
            habits = self.habits(optimizer)
            if not habits.clears and not habits.zeroes:
                self._changes += 1
            habits.clears |= set_to_none
            habits.zeroes |= not set_to_none
        for parameter in parameters if self._consumed else ():
            if self._consumed.pop(id(parameter), None) is not None and not set_to_none:
                store_gradient(parameter, torch.zeros_like(parameter))

    def writes_gradient(self, parameter: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """Notes `p.grad = gradient`."""
        self._consumed.pop(id(parameter), None)
        owner = self.owner(parameter)
        if owner is not None and gradient is None:
            self.habits(owner).clears = True
        return gradient

    def reads_gradient(self, parameter: torch.Tensor) -> None:
        """Notes a look at `p.grad`; one after the step means that steps have to store it.

        Raises:
            GradientNotKeptError: The step has not.
        """
        owner = self.owner(parameter) if self._after_step else None
        if owner is not None:
            self.habits(owner).reads = True
        if self.is_consumed(parameter):
            raise GradientNotKeptError(
                "p.grad was read after optimizer.step(), but the compiled step kept the gradients to itself. "
                "Pass --keep-gradients to the launcher, or TrainingCompilerConfig(keep_gradients=True), to have "
                "them stored after every step."
            )

    def _update_owners(self) -> None:
        if self._owned_at == self._changes:
            return
        self._owned_at = self._changes
        self._owners = {
            id(parameter): weakref.ref(optimizer)
            for optimizer in self._habits
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
