"""qGOFT's penalty: the two columns of every 2 x 2 block stay near right angles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import RuleError
from ..core.measurement import Measurement
from ..tuners.givens_rotations import from_identity
from .base import Rule, TaskContext
from .lora_penalty import check_strength, gradient, work
from .shards import local, whole


@dataclass
class SoftOrthogonal(Rule):
    """strength * sum over layers and blocks of <alpha_i, beta_i>^2, for 2 x 2 blocks with the columns alpha_i, beta_i.

    d alpha_i = 2 strength <alpha_i, beta_i> beta_i, and the other way round.  It is 0 for the identity, from which
    blocks start, and for every scaled rotation: lengths of columns are free. A soft penalty promises no orthogonality.

    It acts on the quasi Givens rotations that train, `GivensConfig(form="quasi")`, all of them in one product. Like
    any penalty here it is added once per optimizer step, after gradient clipping.

    Source: Ma et al., 2404.04316, lambda = 0.001 for large tasks, 0.01 to 0.05 for small ones, 0.5 being too strong;
    neither released version of the code has it.

    Args:
        strength: the factor lambda; 0 measures, and does nothing.

    Raises:
        ConfigError: the strength is negative or not finite.
        RuleError: (from `begin_task`) the model trains no 2 x 2 blocks.
    """

    strength: float = 1e-3
    _groups: list[list[nn.Parameter]] = field(init=False, repr=False, compare=False, default_factory=list)

    def __post_init__(self) -> None:
        check_strength(self, "strength")

    def begin_task(self, task: TaskContext) -> None:
        groups: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
        for blocks in _quasi_blocks(task.model):
            groups.setdefault((blocks.dtype, blocks.device), []).append(blocks)
        if not groups:
            raise RuleError(
                "SoftOrthogonal acts on 2 x 2 blocks of quasi rotations, and this model trains none: use the tuner "
                "GivensConfig(form='quasi'), or take the rule out"
            )
        self._groups = list(groups.values())

    def parameters(self) -> Sequence[nn.Parameter]:
        return [p for params in self._groups for p in params]

    @torch.no_grad()
    def on_gradient(self) -> None:
        if self.strength == 0:
            return
        for params in self._groups:
            rows = [local(p) for p in params]
            g = _end_to_end(rows)
            slope = _products(g)[:, None, None] * g.flip(-1)  # <alpha, beta> (beta, alpha)
            grads = [local(gradient(p)) for p in params]
            torch._foreach_add_(grads, list(slope.split([len(r) for r in rows])), alpha=2 * self.strength)

    @torch.no_grad()
    def penalty(self) -> Tensor:
        """Value of the whole term, strength included: a scalar, for reports and tests. Not needed in training."""
        found = [
            _products(_end_to_end([whole(p) for p in params]).cpu().double()).square().sum() for params in self._groups
        ]
        return self.strength * torch.stack(found).sum()

    @torch.no_grad()
    def guarantee(self) -> list[Measurement]:
        """How far blocks are from right angles: observed figures, a penalty promises none of them."""
        if not self._groups:
            return []
        largest = 0.0
        for params in self._groups:
            g = _end_to_end([whole(p) for p in params])
            lengths = g.norm(dim=1).prod(-1).clamp_(min=torch.finfo(g.dtype).tiny)  # a column of 0 has no angle
            largest = max(largest, (_products(g).abs() / lengths).max().item())
        return [
            Measurement(
                "largest |cosine| of the columns of a block", largest, None, "", "SoftOrthogonal",
                "0: each is a rotation or a mirror image, its columns of any length. 1: one has lost a direction.",
            ),
            Measurement(
                "penalty of orthogonality", self.penalty().item(), None, "", "SoftOrthogonal",
                "What is added to the loss, its strength included.",
            ),
        ]  # fmt: skip


def _end_to_end(params: Sequence[Tensor]) -> Tensor:
    """All blocks I + change, n x 2 x 2, in the working type."""
    return from_identity(work(torch.cat([*params])))


def _products(g: Tensor) -> Tensor:
    """<alpha, beta> of each block (n,)."""
    return g.prod(-1).sum(-1)


def _quasi_blocks(model: nn.Module) -> Iterator[nn.Parameter]:
    """Changes of blocks, (d-1) x 2 x 2, of active adapters that train."""
    for module in model.modules():
        layer: Any = module
        held = getattr(layer, "perpetune_givens_block_change", None)
        if held is not None and not layer.disable_adapters:
            yield from (held[name] for name in layer.active_adapters if name in held and held[name].requires_grad)
