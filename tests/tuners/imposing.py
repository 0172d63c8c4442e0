"""Conditions of the projection rule imposed exactly on a random change, to see what they are worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from perpetune.tuners.linear_map import LinearMap


def maps_of(model: nn.Module, condition: str = "per_head") -> list[LinearMap]:
    """What all layers of a model offer."""
    return [m for layer in model.modules() if hasattr(layer, "linear_maps") for m in layer.linear_maps(condition)]


def rows_read(maps: Sequence[LinearMap], run: Callable[[], Any]) -> list[Tensor]:
    """Of every map the rows (R x d) that it reads when the model runs, as a rule sees them: by forward pre-hooks."""
    seen: list[list[Tensor]] = [[] for _ in maps]
    handles = [
        module.register_forward_pre_hook(lambda _, args, rows=rows: rows.append(args[0].reshape(-1, args[0].shape[-1])))
        for m, rows in zip(maps, seen, strict=True)
        for module in m.modules
    ]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return [torch.cat(rows) for rows in seen]


@torch.no_grad()
def change(maps: Sequence[LinearMap], rows: Sequence[Tensor], weights: Sequence[nn.Parameter], size: float) -> None:
    """p <- p + dp for every weight, dp random but for dW M = 0 of every map, |dp| = size |p|."""
    deltas = {id(p): torch.randn_like(p) for p in weights}
    for m, X in zip(maps, rows, strict=True):
        if id(m.weight) in deltas:
            _, s, Vh = torch.linalg.svd(X, full_matrices=False)
            M = Vh[s > 1e-10 * s[0]].mT
            assert M.shape[1] < m.width  # or else dW = 0, which proves nothing
            D = m.matrix(deltas[id(m.weight)])
            D -= D @ M @ M.mT
    for p in weights:
        dp = deltas[id(p)]
        p += dp * (size * p.norm() / dp.norm())
