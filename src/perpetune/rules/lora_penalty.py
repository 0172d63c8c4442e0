"""What all penalties on LoRA factors share: finding the pairs, and adding an analytic gradient in place."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, RuleError
from .base import Rule, TaskContext
from .lora_sites import LoraPair, lora_pairs
from .shards import cut, local, whole


@dataclass
class LoraPenalty(Rule):
    """A term strength * f(A, B) of the loss, added to `.grad` as its analytic gradient.

    It is added once per optimizer step whatever the gradient accumulation, and after gradient clipping, which therefore
    sees the task's loss alone. The released trainers clip the sum of loss and penalty: so does `before_clipping`, where
    the term is added in the backward pass. A penalty that is much larger than the loss then shrinks the loss's part of
    the step. Strength 0 does nothing.

    Args:
        strength: the factor lambda of the term.
        before_clipping: whether gradient clipping sees the term. With a `GradScaler`, give it to `attach`.

    Raises:
        ConfigError: the strength is negative or not finite.
        RuleError: (from `begin_task`) the model has no trainable LoRA pair.
    """

    strength: float
    before_clipping: bool = field(default=False, kw_only=True, metadata={"unwritten": False})
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

    def terms(self) -> Iterable[tuple[Sequence[nn.Parameter], Sequence[Tensor], float]]:
        """The gradient of the term: parameters, as many values, and the factor of these."""
        raise NotImplementedError

    @torch.no_grad()
    def on_gradient(self) -> None:
        for params, values, scale in () if self.before_clipping else self.terms():
            add_gradients(params, values, scale)

    @torch.no_grad()
    def gradients(self) -> list[tuple[nn.Parameter, Tensor]]:
        """(parameter, gradient of the term) for all that train, for whoever adds them at another time.
        Of sharded ones, the rows that this process holds."""
        found = ((p, scale * v) for params, values, scale in self.terms() for p, v in zip(params, values, strict=True))
        return [(p, cut(v, p)) for p, v in found if p.requires_grad]

    def parameters(self) -> list[nn.Parameter]:
        """Those of the active pairs that train."""
        return [p for pair in self._pairs for p in (pair.A, pair.B) if p.requires_grad]

    def penalty(self) -> Tensor:
        """Value of the whole term, strength included: a scalar, for reports and tests. Not needed in training."""
        raise NotImplementedError


def check_strength(rule: Rule, setting: str) -> None:
    """Raises ConfigError unless the setting is a finite number that is not negative."""
    value = getattr(rule, setting)
    if not math.isfinite(value) or value < 0:
        raise ConfigError(f"{type(rule).__name__}: {setting}={value} must be a finite number, 0 or more")


def work(p: Tensor) -> Tensor:
    """The values in the type that penalties compute in: fp64 stays, all else is fp32 (half precision is too coarse).
    Of sharded ones all, since products and norms need them: every process must call it."""
    p = whole(p)
    return p if p.dtype == torch.float64 else p.float()


def gradient(p: nn.Parameter) -> Tensor:
    """`p.grad`, made of zeros where the loss did not reach the parameter: the penalty still does."""
    if p.grad is None:
        p.grad = torch.zeros_like(p)
    return p.grad


def add_gradients(params: Sequence[nn.Parameter], values: Sequence[Tensor], scale: float) -> None:
    """p.grad += scale * value for all parameters that train, in one call; rounded once where p is half precision. Of
    sharded ones, values are whole, and cut to the rows that are here."""
    chosen = [(local(gradient(p)), cut(v, p)) for p, v in zip(params, values, strict=True) if p.requires_grad]
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
    return work(torch.stack([whole(t) for t in tensors]))
