"""Penalties that are in the gradients before these are clipped, as released trainers have it: part of the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .shards import local, sharded


class Penalty(Protocol):
    """A rule that can hand out its gradients instead of adding them."""

    def gradients(self) -> list[tuple[nn.Parameter, Tensor]]: ...

    def parameters(self) -> list[nn.Parameter]: ...


class BeforeClipping:
    """Adds the gradient of penalties while a backward pass fills `.grad`, once for each optimizer step.

    It does not matter in which of several accumulated passes: weights do not change between them. So it is the first
    one that fills a parameter's `.grad` since the last step, or since `.grad` was taken away (`zero_grad`). What no
    pass reached is added by `rest`, before the step and after clipping.

    Args:
        penalties: the rules.
        scaler: the `torch.amp.GradScaler` of the loop, whose scale gradients have in a backward pass.
    """

    def __init__(self, penalties: Sequence[Penalty], scaler: Any = None) -> None:
        self.penalties, self.scaler = penalties, scaler
        self.values: dict[int, Tensor] = {}  # gradients of the penalties with the weights as they are
        self.params = {id(p): p for rule in penalties for p in rule.parameters()}
        self.due = set(self.params)
        self.added = False  # in a backward pass since the last step
        self.handles: list[RemovableHandle] = []
        self.sharded = any(sharded(p) for p in self.params.values())
        if self.sharded:
            self._compute()
        for p in self.params.values():
            self.handles += [p.register_hook(self._arrives(p)), p.register_post_accumulate_grad_hook(self._arrived)]

    def _arrives(self, p: nn.Parameter) -> Callable[[Tensor], None]:
        def look(_: Tensor) -> None:
            if p.grad is None:  # the pass before was thrown away
                self.due.add(id(p))

        return look

    @torch.no_grad()
    def _arrived(self, p: Tensor) -> None:
        if id(p) not in self.due or p.grad is None:
            return
        scale = self.scaler.get_scale() if self.scaler is not None and self.scaler.is_enabled() else 1.0
        self._add(p, scale)
        self.added = True

    @torch.no_grad()
    def rest(self) -> None:
        """Add what no backward pass has reached."""
        for key in list(self.due):
            p = self.params[key]
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            self._add(p, 1.0)

    def _add(self, p: Tensor, scale: float) -> None:
        if not self.values:
            self._compute()
        self.due.discard(id(p))
        if id(p) in self.values and p.grad is not None:
            local(p.grad).add_(self.values[id(p)], alpha=scale)

    @torch.no_grad()
    def _compute(self) -> None:
        for q, value in (pair for rule in self.penalties for pair in rule.gradients()):
            self.values[id(q)] = self.values[id(q)] + value if id(q) in self.values else value

    def stepped(self) -> None:
        """The weights have changed."""
        self.values, self.due, self.added = {}, set(self.params), False
        if self.sharded:  # whole weights are gathered between steps, and not within a backward pass
            self._compute()
