"""What subspace projection promises of every layer, and what was measured of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..linear_map import LinearMap
from .layer_memory import LayerMemory

# |dW M| / |W| that one projection and one rounding to the type of the weights leave.
LEAK = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}


@dataclass(frozen=True)
class Certificate:
    """What was measured at one weight: leak = |dW M| / |W|, drift = |dW X| / |X|, and what they cannot pass."""

    name: str
    leak: float
    leak_bound: float
    drift: float
    drift_bound: float


@torch.no_grad()
def certificates(memory: LayerMemory, changes: Sequence[tuple[LinearMap, Tensor]]) -> list[Certificate]:
    """One for every protected weight. Where weights are sharded, every process must call it, and gets the same.

    Args:
        memory: of the old inputs.
        changes: each map with its W_ref (out x d): dW = W - W_ref.
    """
    found = []
    for site, W_ref in changes:
        kept = memory.of(site)
        moments, M = kept.memory, kept.M
        W = site.whole(site.matrix(site.weight)).to("cpu", torch.float64)
        D = W - site.whole(W_ref).to(W)  # rows x d
        norm, leak = W.norm(), (D @ M).norm()
        promised = LEAK.get(site.weight.dtype, LEAK[torch.bfloat16])
        # D = D (I - M M^T) + D M M^T: the bound holds for the first term, the promised leak for the second. The
        # sums that C is made of round, too.
        rounding = torch.finfo(memory.products).eps * len(M) * moments.total * D.square().sum()
        bound = (moments.bound(D, M).sqrt() + promised * norm * moments.total.sqrt()).square() + rounding
        found.append(
            Certificate(
                site.name,
                (leak / norm.clamp_min(torch.finfo(norm.dtype).tiny)).item(),
                promised,
                (moments.drift(D) / moments.total).sqrt().item(),
                (bound / moments.total).sqrt().item(),
            )
        )
    return found


def worst(found: Sequence[Certificate]) -> tuple[Certificate, Certificate]:
    """The weight that comes nearest to its bound on the leak, and the one that does on the drift."""
    return (
        max(found, key=lambda c: _ratio(c.leak, c.leak_bound)),
        max(found, key=lambda c: _ratio(c.drift, c.drift_bound)),
    )


def _ratio(value: float, bound: float) -> float:
    return math.inf if math.isnan(value) else value / bound if bound else value
