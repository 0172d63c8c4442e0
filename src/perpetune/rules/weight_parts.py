"""What trains of a weight, and is kept out of the leading singular directions: the weight itself, or its LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import RuleError
from ..tuners.linear_map import LinearMap
from .linear_sites import linear_sites
from .lora_penalty import work
from .lora_sites import LoraPair, lora_pairs
from .weight_bases import WeightBasis, exact

TINY = 1e-300


@dataclass(frozen=True)
class Whole:
    """A weight that trains itself: W <- W_ref + (I - U U^T) (W - W_ref) (I - V V^T)."""

    site: LinearMap
    basis: WeightBasis
    W_ref: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.site.weight.dtype

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [self.site.weight]

    def gradient(self) -> None:
        if self.site.weight.grad is not None:
            g = self.site.matrix(self.site.weight.grad)
            g.copy_(self.basis.outside(work(g)))

    def update(self) -> None:
        W = self.site.matrix(self.site.weight)
        W.copy_(self.W_ref + self.basis.outside(work(W) - self.W_ref))

    def change(self) -> Tensor:
        """dW (out x d), fp64."""
        return exact(self.site.matrix(self.site.weight)) - exact(self.W_ref)

    def leaks(self) -> tuple[float, float, float]:
        """|U^T dW| / |W|, |dW V| / |W|, and |W|, relative to which dW is promised."""
        D, basis = self.change(), self.basis.exact()
        size = exact(self.site.matrix(self.site.weight)).norm().clamp_min(TINY)
        return float((basis.U.mT @ D).norm() / size), float((D @ basis.V).norm() / size), float(size)


@dataclass(frozen=True)
class Factors:
    """A LoRA on W_ref, dW = s B A: A <- A (I - V V^T), B <- (I - U U^T) B."""

    pair: LoraPair
    basis: WeightBasis
    W_ref: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.pair.B.dtype

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [self.pair.A, self.pair.B]

    def gradient(self) -> None:
        for p, outside in self._outside():
            if p.grad is not None:
                p.grad.copy_(outside(work(p.grad)))

    def update(self) -> None:
        for p, outside in self._outside():
            p.copy_(outside(work(p)))

    def _outside(self) -> tuple[tuple[nn.Parameter, Any], ...]:
        return (self.pair.A, self.basis.outside_right), (self.pair.B, self.basis.outside_left)

    def change(self) -> Tensor:
        """dW (out x d), fp64."""
        A, B = exact(self.pair.A), exact(self.pair.B)
        return self.pair.scaling * B @ A

    def leaks(self) -> tuple[float, float, float]:
        """|U^T B| / |B|, |A V| / |A|, and s |B| |A|, relative to which dW is promised."""
        A, B, basis = exact(self.pair.A), exact(self.pair.B), self.basis.exact()
        left, right = (basis.U.mT @ B).norm(), (A @ basis.V).norm()
        size = float(self.pair.scaling * B.norm() * A.norm())
        return float(left / B.norm().clamp_min(TINY)), float(right / A.norm().clamp_min(TINY)), size


def matrices(model: nn.Module) -> list[LinearMap]:
    """The weights of linear layers that train themselves, whole on every process; none of a model that trains LoRA.

    Raises:
        RuleError: one is sharded.
    """
    from transformers.pytorch_utils import Conv1D

    if lora_pairs(model):
        return []
    sites = [s for s in linear_sites(model)[0] if all(isinstance(m, nn.Linear | Conv1D) for m in s.modules)]
    sites = [s for s in sites if any(s.weight is m.weight for m in s.modules)]  # and not its bias
    for site in sites:
        _check(site.name, site.weight)
    return sites


def adapted(model: nn.Module, pairs: Sequence[LoraPair]) -> Iterator[tuple[LoraPair, Tensor]]:
    """Each pair with the weight (out x d) that it adapts, frozen adapters of earlier tasks beside it included.

    Raises:
        RuleError: the weight is quantised, sharded, or not there.
    """
    from transformers.pytorch_utils import Conv1D

    for pair in pairs:
        layer: Any = model.get_submodule(pair.name)
        base = layer.get_base_layer()
        if pair.weight is None:
            raise RuleError(f"WeightProjection finds no weight in `{pair.name}`: leave it out of the tuner's targets")
        _check(pair.name, pair.weight)
        W = work(pair.weight)
        for name in layer.active_adapters:
            if name in layer.lora_A and layer.lora_A[name].weight is not pair.A:
                W = W + layer.get_delta_weight(name).detach().to(W)
        yield pair, W.mT if isinstance(base, Conv1D) else W


def _check(name: str, weight: Tensor) -> None:
    if hasattr(weight, "to_local"):
        raise RuleError(f"`{name}` is sharded, and WeightProjection decomposes whole weights: train without sharding")
    if not weight.is_floating_point() or weight.ndim != 2:
        raise RuleError(f"`{name}` is quantised, and WeightProjection decomposes weights: load the model without")
