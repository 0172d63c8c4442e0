"""Masks laid over tensors: bit by bit, and in pieces that stay in the processor's cache.

torch chooses between two values entry by entry (`where`, `masked_fill_`), and draws with a given chance
(`bernoulli_`), four to ten times slower than it does arithmetic on integers. A mask here is an integer for each entry,
-1 inside it (all bits set) and 0 outside: -0, infinities and nan are kept as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
PIECE = 2**20  # entries


def as_bits(values: Tensor) -> Tensor:
    """The entries as integers of their own width, a view."""
    return values.view(INTEGERS[values.element_size()])


def pieces(values: Tensor) -> Sequence[Tensor]:
    """A tensor, or this rank's shard of it, as views of about 2^20 entries, cut along the first dimension."""
    if hasattr(values, "to_local"):
        values = values.to_local()
    if values.ndim == 0:
        return (values,)
    return values.split(max(1, PIECE * len(values) // max(1, values.numel())))


def restore(values: Tensor, start: Tensor, inside: Tensor) -> None:
    """values <- start outside the mask, in place and without a tensor of the same size beside it."""
    w, s = as_bits(values), as_bits(start)
    w.bitwise_xor_(s).bitwise_and_(inside).bitwise_xor_(s)


def draw(like: Tensor, keep: float, generator: torch.Generator) -> Tensor:
    """1 with probability keep, else 0, for every entry of a tensor: int16, of the same shape.

    From 16 random bits an entry, four to one number of the generator: the same on every processor, which
    `bernoulli_` is not. So keep is rounded to a multiple of 2^-16, and is at least that.
    """
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device)
    words.random_(-(2**63), None, generator=generator)  # all 64 bits; int16 are then uniform in [-2^15, 2^15)
    below = max(1, round(keep * 2**16)) - 2**15
    return words.view(torch.int16)[: like.numel()].le_(below - 1).view(like.shape)
