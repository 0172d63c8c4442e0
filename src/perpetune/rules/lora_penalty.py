"""What all penalties on LoRA factors share: finding the pairs, and adding an analytic gradient in place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, RuleError
from .base import Rule, TaskContext
from .lora_sites import LoraPair, lora_pairs


@dataclass
class LoraPenalty(Rule):
    """A term strength * f(A, B) of the loss, added to `.grad` as its analytic gradient.

    It is added once per optimizer step whatever the gradient accumulation, and after gradient clipping, which therefore
    sees the task's loss alone (the released trainers clip the sum of loss and penalty). Strength 0 does nothing.

    Args:
        strength: the factor lambda of the term.

    Raises:
        ConfigError: the strength is negative or not finite.
        RuleError: (from `begin_task`) the model has no trainable LoRA pair.
    """

    strength: float
    _pairs: list[LoraPair] = field(init=False, repr=False, compare=False, default_factory=list)

    def __post_init__(self) -> None:
        check_strength(self, "strength")

    @property
    def active(self) -> bool:
        """Whether any strength is above 0."""
        return self.strength > 0

    def begin_task(self, task: TaskContext) -> None:
        self._pairs = lora_pairs(task.model) if self.active else []
        if self.active and not self._pairs:
            raise RuleError(
                f"{type(self).__name__} acts on LoRA of linear layers (peft.LoraConfig), and this model trains none: "
                "use a LoRA tuner, or take the rule out"
            )

    def penalty(self) -> Tensor:
        """Value of the whole term, strength included: a scalar, for reports and tests. Not needed in training."""
        raise NotImplementedError


def check_strength(rule: Rule, setting: str) -> None:
    """Raises ConfigError unless the setting is a finite number that is not negative."""
    value = getattr(rule, setting)
    if not math.isfinite(value) or value < 0:
        raise ConfigError(f"{type(rule).__name__}: {setting}={value} must be a finite number, 0 or more")


def work(p: Tensor) -> Tensor:
    """The values in the type that penalties compute in: fp64 stays, all else is fp32 (half precision is too coarse)."""
    p = p.detach()
    return p if p.dtype == torch.float64 else p.float()


def gradient(p: nn.Parameter) -> Tensor:
    """`p.grad`, made of zeros where the loss did not reach the parameter: the penalty still does."""
    if p.grad is None:
        p.grad = torch.zeros_like(p)
    return p.grad


def add_gradients(params: Sequence[nn.Parameter], values: Sequence[Tensor], scale: float) -> None:
    """p.grad += scale * value for all parameters that train, in one call; rounded once where p is half precision."""
    chosen = [(gradient(p), v) for p, v in zip(params, values, strict=True) if p.requires_grad]
    if chosen:
        grads, values = zip(*chosen, strict=True)
        torch._foreach_add_(list(grads), list(values), alpha=scale)


def same_shape(pairs: Sequence[LoraPair]) -> list[list[LoraPair]]:
    """The pairs in groups that can be stacked."""
    groups: dict[tuple, list[LoraPair]] = {}
    for pair in pairs:
        key = (pair.A.shape, pair.B.shape, pair.A.dtype, pair.B.dtype, pair.A.device)
        groups.setdefault(key, []).append(pair)
    return list(groups.values())


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """(n x ...) in the working type."""
    return work(torch.stack([t.detach() for t in tensors]))
