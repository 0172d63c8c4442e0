"""How the kept deltas of all tasks become one change of the weights, a chunk of a tensor at a time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NOTHING = np.float32(-0.0)  # x + -0.0 is x to the bit, also for x = -0.0


@dataclass(frozen=True)
class Chunk:
    """What one task keeps of a stretch of a tensor.

    Attributes:
        positions: of the kept entries, ascending, from the beginning of the stretch; none comes twice.
        kept: their values m_t * d_t, fp32, as they are stored.
        scale: the factor of this task.
    """

    positions: NDArray[np.intp]
    kept: NDArray[np.float32]
    scale: float = 1.0

    @property
    def values(self) -> NDArray[np.float32]:
        """scale * m_t * d_t at `positions`."""
        return self.kept if self.scale == 1 else self.kept * np.float32(self.scale)


@dataclass
class Combination:
    """One change from those of all tasks. A combination of your own is a dataclass with a `__call__`."""

    def __call__(self, chunks: Iterable[Chunk], size: int) -> NDArray[np.float32]:
        """The change of a stretch of `size` entries.

        Args:
            chunks: one for each task that changes this tensor, in the order of the task keys; each is read from its
                file as it is asked for.
        """
        raise NotImplementedError


@dataclass
class Sum(Combination):
    """sum_t scale_t * m_t * d_t, in fp32."""

    def __call__(self, chunks: Iterable[Chunk], size: int) -> NDArray[np.float32]:
        S = np.full(size, NOTHING)
        for chunk in chunks:
            np.add.at(S, chunk.positions, chunk.values)  # in one pass; no position comes twice
        return S


@dataclass
class ElectSign(Combination):
    """The mean of those values whose sign has the larger total magnitude, entry by entry:

        gamma = sgn(sum_t tau_t),    tau = mean of {tau_t : sgn(tau_t) = gamma},    tau_t = scale_t * m_t * d_t.

    Entries that a task does not keep do not count in the mean. Where both signs weigh the same, gamma = 0 and nothing
    changes. Sums in fp64.

    Source: TIES-merging (2306.01708), steps "elect" and "disjoint merge". Its released code gives gamma = 0 the sign
    that most entries of the model have.
    """

    def __call__(self, chunks: Iterable[Chunk], size: int) -> NDArray[np.float32]:
        mass = np.zeros((2, size))  # of the values above 0, and of those below
        count = np.zeros((2, size), dtype=np.int32)
        for chunk in chunks:
            values = chunk.values
            for side, mine in enumerate((values > 0, values < 0)):
                mass[side, chunk.positions[mine]] += values[mine]
                count[side, chunk.positions[mine]] += 1
        gamma = mass.sum(0)
        elected = (gamma < 0).astype(np.intp)[None]
        mean = np.take_along_axis(mass, elected, 0)[0] / np.maximum(np.take_along_axis(count, elected, 0)[0], 1)
        return np.where(gamma == 0, NOTHING, mean).astype(np.float32)


@dataclass
class ElectLargest(Combination):
    """Of those values whose sign has the larger total magnitude the largest, entry by entry:

        gamma = sgn(sum_t tau_t),    tau = gamma max{|tau_t| : sgn(tau_t) = gamma},    tau_t = scale_t * m_t * d_t.

    Where both signs weigh the same, gamma = 0 and nothing changes. Sums in fp64.

    Source: the universal adapter of TUNA (2508.08165). Its released code gives gamma = 0 the sign -1.
    """

    def __call__(self, chunks: Iterable[Chunk], size: int) -> NDArray[np.float32]:
        total, top = np.zeros(size), np.zeros((2, size), dtype=np.float32)  # the largest above 0, and below
        for chunk in chunks:
            values = chunk.values
            total[chunk.positions] += values
            top[0, chunk.positions] = np.maximum(top[0, chunk.positions], values)
            top[1, chunk.positions] = np.minimum(top[1, chunk.positions], values)
        return np.where(total == 0, NOTHING, np.where(total > 0, top[0], top[1])).astype(np.float32)


COMBINATIONS = {c.__name__: c for c in (Sum, ElectSign, ElectLargest)}
