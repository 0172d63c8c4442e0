"""Child-Tuning-F: at every step, only a fresh random share of the entries is listened to, or may move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, RuleError
from .base import Rule, TaskContext
from .mask_bits import draws, restore
from .mask_selection import check_keep, mixed


@dataclass
class StepMask(Rule):
    """A mask M_t ~ Bernoulli(keep), fresh for every entry at every step.

    "gradient"  g <- M_t * g / keep before the step, as published. Under Adam the 1/keep cancels and the moments move
                nearly all entries at every step: in the long run it is plain Adam with learning rate * sqrt(keep).
                Under SGD the mean step is that of all gradients, its variance larger.
    "update"    w <- M_t * w + (1 - M_t) * w_before after the step, to the bit: what lies outside the mask has not
                moved, whatever Adam's moments and weight decay did. Nothing is multiplied by 1/keep.

    It acts on every parameter of the model that trains, embeddings, norms and biases included. It supplies noise, and
    protects nothing of earlier tasks. The draws come from a generator of the rule's own, seeded by (seed, number of the
    task): the global one is left alone. Of sharded weights (FSDP2) each process draws the masks of all rows and takes
    those of its own, so that masks are those of one process.

    Source: Child-Tuning-F, Xu et al., 2109.05687; the factor 1/keep is that of its code.

    Args:
        keep: probability that an entry is in the mask, to the nearest multiple of 2^-16; 1 is plain training.
        on: "gradient" or "update".
        seed: what the masks are drawn from.

    Raises:
        ConfigError: a setting is out of range.
        RuleError: (from `begin_task`) the model trains nothing.
    """

    keep: float = 0.3
    on: Literal["gradient", "update"] = "gradient"
    seed: int = 0
    _params: list[nn.Parameter] = field(init=False, repr=False, compare=False, default_factory=list)
    _generators: dict[torch.device, torch.Generator] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )
    _task: int = field(init=False, repr=False, compare=False, default=0)
    _resumed: dict[str, Tensor] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        check_keep(self, self.keep, self.seed)
        if self.on not in ("gradient", "update"):
            raise ConfigError(f"StepMask: on=`{self.on}` must be gradient or update")

    def begin_task(self, task: TaskContext) -> None:
        self._params = [p for p in task.model.parameters() if p.requires_grad]
        if not self._params:
            raise RuleError(
                "StepMask acts on weights that train, and this model trains none: use a tuner that trains some "
                "(AllWeights, LoRA), or take the rule out"
            )
        seed, devices = mixed(self.seed, task.index), dict.fromkeys(p.device for p in self._params)
        self._generators = {d: torch.Generator(d).manual_seed(seed) for d in devices}
        if self._resumed and int(self._resumed["task"]) == task.index:
            for i, generator in enumerate(self._generators.values()):
                generator.set_state(self._resumed[f"draws.{i}"])
        self._task, self._resumed = task.index, {}

    @torch.no_grad()
    def on_gradient(self) -> None:
        for p in self._params if self.on == "gradient" else ():
            for g, M in () if p.grad is None else draws(p.grad, self.keep, self._generators[p.device]):
                g.mul_(M).div_(self.keep)

    def parameters(self) -> Sequence[nn.Parameter]:
        return self._params

    def watches(self) -> Sequence[nn.Parameter]:
        return self._params if self.on == "update" else ()

    @torch.no_grad()
    def on_update(self, before: Sequence[Tensor]) -> None:
        for p, values in zip(self.watches(), before, strict=True):
            start = 0
            for w, M in draws(p.detach(), self.keep, self._generators[p.device]):
                w_before = values[start : start + len(w)] if p.ndim else values
                start += len(w) if p.ndim else 0
                restore(w, w_before, inside=M.neg_())

    def end_task(self, task: TaskContext) -> None:
        self._params, self._generators = [], {}

    def state(self) -> dict[str, Tensor]:
        """Within a task, how far the draws have come: `task`, its number, and `draws.<i>` of each device."""
        draws = {f"draws.{i}": generator.get_state() for i, generator in enumerate(self._generators.values())}
        return {"task": torch.tensor(self._task), **draws} if draws else {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state`. Loaded within a task, `begin_task` goes on with its draws.

        Raises:
            RuleError: tensors that are not this rule's.
        """
        strange = [key for key in state if key != "task" and not key.startswith("draws.")]
        if strange or (state and "task" not in state):
            raise RuleError(f"`{(strange or ['draws'])[0]}` is no state of StepMask: expected `task` and `draws.<i>`")
        self._params, self._generators, self._resumed = [], {}, dict(state)
