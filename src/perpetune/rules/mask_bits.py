"""Masks laid over tensors: bit by bit, and in pieces that stay in the processor's cache.

torch chooses between two values entry by entry (`where`, `masked_fill_`), and draws with a given chance
(`bernoulli_`), four to ten times slower than it does arithmetic on integers. A mask here is an integer for each entry,
-1 inside it (all bits set) and 0 outside: -0, infinities and nan are kept as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .shards import local, rows_here

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
PIECE = 2**20  # entries


def as_bits(values: Tensor) -> Tensor:
    """The entries as integers of their own width, a view."""
    return values.view(INTEGERS[values.element_size()])


def pieces(values: Tensor) -> Sequence[Tensor]:
    """A tensor, or this rank's shard of it, as views of about 2^20 entries, cut along the first dimension."""
    values = local(values)
    if values.ndim == 0:
        return (values,)
    return values.split(_rows(values))


def draws(values: Tensor, keep: float, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of a tensor as `pieces` cuts them, each with a mask that `draw` makes. Of a shard the masks are those of
    the whole tensor, all of which are drawn, and the pieces what this process holds of each."""
    rows = rows_here(values)
    if rows == slice(None):
        yield from ((piece, draw(piece, keep, generator)) for piece in pieces(values))
        return
    here, start, step = local(values), 0, _rows(values)
    while start < len(values):
        count = min(step, len(values) - start)
        mask = draw(here.new_empty((count, *values.shape[1:]), device="meta"), keep, generator)
        first, last = max(start, rows.start), min(start + count, rows.stop)
        if first < last:
            yield here[first - rows.start : last - rows.start], mask[first - start : last - start]
        start += count


def _rows(values: Tensor) -> int:
    """How many rows a piece has."""
    return max(1, PIECE * len(values) // max(1, values.numel()))


def restore(values: Tensor, start: Tensor, inside: Tensor) -> None:
    """values <- start outside the mask, in place and without a tensor of the same size beside it."""
    w, s = as_bits(values), as_bits(start)
    w.bitwise_xor_(s).bitwise_and_(inside).bitwise_xor_(s)


def draw(like: Tensor, keep: float, generator: torch.Generator) -> Tensor:
    """1 with probability keep, else 0, for every entry of a tensor: int16, of the same shape.

    From 16 random bits an entry, four to one number of the generator: the same on every processor, which
    `bernoulli_` is not. So keep is rounded to a multiple of 2^-16, and is at least that.
    """
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=generator.device)
    words.random_(-(2**63), None, generator=generator)  # all 64 bits; int16 are then uniform in [-2^15, 2^15)
    below = max(1, round(keep * 2**16)) - 2**15
    return words.view(torch.int16)[: like.numel()].le_(below - 1).view(like.shape)
