"""Sums that do not depend on the order of their terms: numbers on a grid, counted in steps, added in fp64.

A number on the grid `step * Z` is kept as its number of steps k, an integer with |k| < 2^bits, in fp64. As long as
every partial sum stays below 2^53, fp64 adds such integers without rounding: any order of samples, any batch size, any
split over machines gives the same bits, and a sum is taken back by subtracting it. Products in fp32, TF32 or bf16 are
not exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from ..core.errors import HeadError

EXACT_BITS = 53  # integers below 2^53 are exact in fp64
WIDEST = 8192  # features: beyond it, squared norms could pass 2^63


@dataclass(frozen=True)
class FixedPoint:
    """The grid step * {-(2^bits - 1), ..., 2^bits - 1}; `step` is a power of two, so that scaling is exact."""

    bits: int
    step: float

    def steps(self, x: Tensor) -> tuple[Tensor, int]:
        """x as integers in fp64 (same shape), and how many entries lay outside of the grid and were clipped."""
        k = torch.round(x.to(torch.float64) / self.step)
        top = 2**self.bits - 1
        clipped = int((k.abs() > top).sum())
        return k.clamp_(-top, top), clipped

    def used_bits(self, samples: int, power: int) -> float:
        """power * bits + log2(n): a sum of n products of `power` such integers stays below 2 to this."""
        return power * self.bits + math.log2(max(samples, 1))


# |f| < 128 in steps of 2^-18: features of norm 1 (width 768) keep 3e-5 relative, entries up to 128 are not clipped.
FEATURES = FixedPoint(bits=25, step=2.0**-18)


def check_room(grid: FixedPoint, samples: int, power: int, name: str, advice: str) -> None:
    """Refuse before a sum could lose a bit.

    Raises:
        HeadError: power * bits + log2(n) >= 53.
    """
    if grid.used_bits(samples, power) >= EXACT_BITS:
        raise HeadError(
            f"head `{name}`: {samples} samples of {grid.bits} bits do not fit into exact sums "
            f"({power} * bits + log2(n) must stay below {EXACT_BITS}); {advice}"
        )


def exact_matmul(a: Tensor, bits: int, b: Tensor) -> Tensor:
    """a @ b for integers a (N x K, |a| < 2^bits, fp64) and real b (K x C), to fp64 accuracy.

    b is cut into slices of as many bits as leave every product exact, so that a row of the result does not depend on
    how many rows there are: predictions are the same bits for any batch size.
    """
    room = EXACT_BITS - 1 - bits - (a.shape[1] - 1).bit_length()
    exponent = math.frexp(float(b.abs().max()))[1] if b.numel() else 0
    rest, unit = b.to(torch.float64) * 2.0 ** (room - exponent), 2.0 ** (exponent - room)
    products = []
    for _ in range(math.ceil(EXACT_BITS / room)):
        part = rest.round()
        products.append((a @ part) * unit)
        rest, unit = (rest - part) * 2.0**room, unit * 2.0**-room
    total = products.pop()
    while products:  # from the smallest up
        total = total + products.pop()
    return total


GAUSSIAN = FixedPoint(bits=13, step=2.0**-10)


def gaussian_steps(seed: int, rows: int, columns: int) -> Tensor:
    """Standard normal numbers, (rows x columns), in steps of `GAUSSIAN`: the same bits on every platform.

    Only raw Philox4x64 words and integer arithmetic: w = (u_1 + ... + u_12 - 6 * 65535) / 65536 from the twelve uint16
    lanes of three words (Irwin-Hall: variance 1, |w| <= 6, excess kurtosis -0.1), rounded to 2^-10. Filled column by
    column: a wider matrix begins with the narrower one.
    """
    words = numpy.random.Philox(key=numpy.array([seed % 2**64, 0x52504B], dtype=numpy.uint64))  # k1: this use alone
    w = torch.empty(columns, rows, dtype=torch.float64)
    for chunk in w.split(256):  # bounds the memory of the raw words
        lanes = words.random_raw(chunk.numel() * 3).view(numpy.uint16).reshape(*chunk.shape, 12)
        total = lanes.sum(axis=2, dtype=numpy.int64) - 6 * 65535
        chunk.copy_(torch.from_numpy((total + 32) >> 6))
    return w.T.contiguous()
