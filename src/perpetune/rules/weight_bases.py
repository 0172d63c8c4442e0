"""Bases from the weights themselves: leading singular directions of a matrix, and how many of them a layer keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.processes import sum_
from ..tuners.linear_map import LinearMap
from .linear_sites import Batches, see_inputs
from .lora_penalty import work


@dataclass(frozen=True)
class WeightBasis:
    """The k leading singular triples of W (out x d), decomposed in fp64; fp32 unless W is fp64.

    Attributes:
        U: out x k; S: (k,), falling; V: d x k; W V = U diag(S), U^T W = diag(S) V^T.
        norm: |W|_F.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    norm: float

    @classmethod
    def of(cls, W: Tensor, k: int) -> WeightBasis:
        wide = W.detach().to("cpu" if W.device.type == "mps" else W.device, torch.float64)  # mps has no fp64
        U, S, Vt = torch.linalg.svd(wide, full_matrices=False)
        U, S, V = (t.to(W.device, work(W).dtype).contiguous() for t in (U[:, :k], S[:k], Vt[:k].mT))
        return cls(U, S, V, float(wide.norm()))

    def exact(self) -> WeightBasis:
        """On the CPU in fp64, to measure with."""
        return WeightBasis(exact(self.U), exact(self.S), exact(self.V), self.norm)

    @property
    def full(self) -> bool:
        """Whether nothing is left to learn: I - U U^T or I - V V^T is 0."""
        return self.U.shape[1] in (len(self.U), len(self.V))

    def outside(self, D: Tensor) -> Tensor:
        """(I - U U^T) D (I - V V^T) for D (out x d); of a full basis 0, and not what rounding leaves."""
        return self.outside_left(self.outside_right(D))

    def outside_left(self, D: Tensor) -> Tensor:
        """(I - U U^T) D for D (out x n)."""
        U = self.U.to(D)
        return torch.zeros_like(D) if U.shape[0] == U.shape[1] else D - U @ (U.mT @ D)

    def outside_right(self, D: Tensor) -> Tensor:
        """D (I - V V^T) for D (n x d)."""
        V = self.V.to(D)
        return torch.zeros_like(D) if V.shape[0] == V.shape[1] else D - (D @ V) @ V.mT


def exact(t: Tensor) -> Tensor:
    return t.detach().to("cpu", torch.float64)


def count(rank: int | float, shape: Sequence[int]) -> int:
    """k of a matrix: the number itself, or a share (a float) of its smaller side, at least 1 and at most all."""
    least = min(shape)
    return max(1, min(least, math.floor(rank * least) if isinstance(rank, float) else rank))


def ratios(importance: Mapping[str, float], least: float, target: float) -> dict[str, float]:
    """Share of the singular directions that each layer keeps: least + I (target - least), I scaled to a mean of 1.

    OSF (2504.07097), where the two are the minimum and the target retention ratio. Cut to [least, 1]. Where the mean
    is not above 0 it cannot be scaled, and every layer keeps `target`.
    """
    mean = math.fsum(importance.values()) / max(1, len(importance))
    scaled = {name: value / mean if mean > 0 else 1.0 for name, value in importance.items()}
    return {name: min(1.0, max(least, least + value * (target - least))) for name, value in scaled.items()}


@torch.no_grad()
def layer_importance(model: nn.Module, sites: Sequence[LinearMap], batches: Batches) -> dict[str, float]:
    """I = mean over tokens x of cos(x, W x), for every layer that is called.

    Where W is not square, x and W x are both cut to the first min(out, d) entries, as the code of OSF does.
    """
    totals: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}

    def see(site: LinearMap, X: Tensor, mask: Tensor | None) -> None:
        W = site.matrix(site.weight)
        rows = X.reshape(-1, X.shape[-1])
        if mask is not None:
            rows = rows[mask.reshape(-1).bool()]
        n = min(W.shape)
        cosines = nn.functional.cosine_similarity(rows[:, :n].double(), (rows.to(W) @ W.mT)[:, :n].double(), dim=1)
        totals[site.name] = totals.get(site.name, torch.zeros((), dtype=torch.float64)) + cosines.sum().cpu()
        tokens[site.name] = tokens.get(site.name, 0) + len(rows)

    see_inputs(model, sites, batches(), see)
    zero = torch.zeros((), dtype=torch.float64)
    names = [site.name for site in sites]
    sums = torch.stack([torch.stack([totals.get(n, zero), torch.tensor(tokens.get(n, 0)).double()]) for n in names])
    sum_([sums])  # each process has seen inputs of its own
    return {name: total / count for name, (total, count) in zip(names, sums.tolist(), strict=True) if count}
