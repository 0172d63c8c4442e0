"""Linear maps of like shapes, laid together so that one product serves all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..tuners.linear_map import LinearMap
from .layer_memory import LayerMemory
from .lora_penalty import work

BUCKET = 64  # bases of as many columns, rounded up to this, are padded with zeros and multiplied at once


@dataclass
class StackedMaps:
    """n inputs of one width d, read by R rows of weights each: W_ref (n x R x d), M (n x d x k).

    `full`: M spans everything, I - M M^T is 0 and not what rounding leaves of it. `sites` lists those of the first
    input, then those of the second, and so on: their rows laid end to end are W.
    """

    sites: list[LinearMap]
    W_ref: Tensor
    M: Tensor
    full: bool

    def stacked(self, values: Sequence[Tensor | None]) -> Tensor:
        """(n x R x d) of the weights, or of as many tensors of their shapes; None counts as zeros."""
        rows = [
            s.matrix(torch.zeros_like(s.weight) if v is None else v) for s, v in zip(self.sites, values, strict=True)
        ]
        return work(torch.cat(rows)).view(self.W_ref.shape)

    def write(self, targets: Sequence[Tensor | None], values: Tensor) -> None:
        """values (n x R x d) back to where they came from, rounded once where that is half precision."""
        places = [None if t is None else s.matrix(t) for s, t in zip(self.sites, targets, strict=True)]
        sizes = [len(s.matrix(s.weight)) for s in self.sites]
        pairs = zip(places, values.flatten(0, 1).split(sizes), strict=True)
        chosen = [(place, v) for place, v in pairs if place is not None]
        if chosen:
            torch._foreach_copy_([place for place, _ in chosen], [v for _, v in chosen])

    def references(self) -> list[tuple[LinearMap, Tensor]]:
        """Each map with its W_ref (out x d)."""
        sizes = [len(site.matrix(site.weight)) for site in self.sites]
        return list(zip(self.sites, self.W_ref.flatten(0, 1).split(sizes), strict=True))


def stack(
    sites: Sequence[LinearMap], memory: LayerMemory, reference: Callable[[LinearMap], Tensor]
) -> list[StackedMaps]:
    """Weights that read one input share its M; inputs of like shapes are multiplied at once.

    Args:
        reference: gives W_ref (out x d) of a map.
    """
    readers: dict[tuple, list[LinearMap]] = {}
    for site in sites:
        where = (site.weight.dtype, site.weight.device, site.rows)  # rows and columns of one weight: one by one
        readers.setdefault((memory.reads[site.name], *where), []).append(site)
    alike: dict[tuple, list[tuple[Tensor, list[LinearMap]]]] = {}
    for (index, *kind), members in readers.items():
        M = memory.inputs[index].M
        if M.shape[1]:  # nothing to protect where all inputs were 0
            R = sum(len(site.matrix(site.weight)) for site in members)
            full = M.shape[1] == len(M)
            alike.setdefault((full, *kind, R, len(M), -(-M.shape[1] // BUCKET)), []).append((M, members))
    found = []
    for (full, *_), inputs in alike.items():
        members = [site for _, group in inputs for site in group]
        W = work(torch.cat([reference(site) for site in members]))
        k = max(M.shape[1] for M, _ in inputs)
        padded = [nn.functional.pad(M, (0, k - M.shape[1])).to(W.device, W.dtype) for M, _ in inputs]
        found.append(StackedMaps(members, W.view(len(inputs), -1, W.shape[1]), torch.stack(padded), full))
    return found
