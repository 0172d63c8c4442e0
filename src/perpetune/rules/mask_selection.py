"""What masks are made of: the k largest of very many scores, bits on disk, draws that repeat themselves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..core.errors import ConfigError

DIGIT = 16  # bits of a score that one pass over the tensors settles


def largest(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """Masks of exactly the k largest of all entries; of equal ones, those that stand first, tensors laid end to end.

    Nothing is sorted: floats that are not negative are ordered as their bits are, so that a histogram of the first 16
    bits finds those of the k-th largest, a second one among these the next 16. Memory beside the scores is that of the
    largest tensor.

    Args:
        scores: 0 or above, finite, all fp32 or all fp64, of any shapes.
        k: at most the number of entries.

    Returns:
        bool tensors of the same shapes.
    """
    if k == 0:
        return [torch.zeros_like(score, dtype=torch.bool) for score in scores]
    cut, ties = _kth_largest(scores, k)
    masks = []
    for score in scores:
        bits = _bits(score)
        mask = bits > cut
        equal = (bits == cut).nonzero()[:ties, 0]
        mask[equal] = True
        ties -= len(equal)
        masks.append(mask.view(score.shape))
    return masks


def _bits(score: Tensor) -> Tensor:
    """(numel,) integers in the order of the scores."""
    return score.flatten().view(torch.int64 if score.dtype == torch.float64 else torch.int32)


def _kth_largest(scores: Sequence[Tensor], k: int) -> tuple[int, int]:
    """Bits of the k-th largest score, and how many of those equal to it belong to the k largest."""
    total, found = 8 * scores[0].element_size(), 0
    for shift in range(total - DIGIT, -1, -DIGIT):
        counts = torch.zeros(2**DIGIT, dtype=torch.int64)
        for score in scores:
            bits = _bits(score)
            if shift < total - DIGIT:
                bits = bits[(bits >> (shift + DIGIT)) == found]
            counts += torch.bincount((bits >> shift) & (2**DIGIT - 1), minlength=2**DIGIT).cpu()
        reached = counts.flip(0).cumsum(0)  # entry i: how many have a digit of 2^16 - 1 - i or more
        i = int(torch.searchsorted(reached, k))
        digit = 2**DIGIT - 1 - i
        k -= int(reached[i] - counts[digit])
        found = (found << DIGIT) | digit
    return found, k


def pack(mask: Tensor) -> Tensor:
    """A bool tensor as bits: (ceil(numel / 8),) uint8 on the CPU."""
    return torch.from_numpy(np.packbits(mask.flatten().cpu().numpy()))


def unpack(bits: Tensor, like: Tensor) -> Tensor:
    """Inverse of `pack`, in the shape and on the device of `like`."""
    flat = np.unpackbits(bits.cpu().numpy(), count=like.numel()).astype(bool)
    return torch.from_numpy(flat).view(like.shape).to(like.device)


def mixed(seed: int, index: int) -> int:
    """A seed from a rule's own and the number of the task."""
    return int(np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def check_keep(rule: object, keep: float, seed: int) -> None:
    """Raises ConfigError unless keep is a share above 0 and the seed one that can be drawn from."""
    if not 0 < keep <= 1:
        raise ConfigError(
            f"{type(rule).__name__}: keep={keep} is the share of entries that may move: above 0, at most 1"
        )
    if seed < 0:
        raise ConfigError(f"{type(rule).__name__}: seed={seed} must be 0 or above")
