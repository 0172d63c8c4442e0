"""How often sparse deltas of different tasks change the same weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .combine import check_compatible
from .delta import Delta
from .seeded_mask import CHUNK


@dataclass(frozen=True)
class Overlap:
    """How the masks of K deltas meet; tensors kept whole do not count.

    Attributes:
        common: (K x K), entries kept by both; the diagonal is what each keeps.
        hits: (K + 1), entries kept by exactly 0, 1, ... K of them, over all tensors that any of them masks.
    """

    common: NDArray[np.int64]
    hits: NDArray[np.int64]

    @property
    def share(self) -> NDArray[np.float64]:
        """|m_i and m_j| / |m_i|, K x K."""
        return self.common / np.maximum(self.common.diagonal(), 1)[:, None]

    @property
    def collisions(self) -> int:
        """Entries kept by two or more."""
        return int(self.hits[2:].sum())


class Meetings:
    """Counts the entries that deltas keep, and those that two or more keep, one delta after the other: two bits are
    held for each entry, and no delta.

    Attributes:
        kept: entries kept by at least one; met: by two or more. Tensors kept whole do not count.
    """

    def __init__(self) -> None:
        self.kept = self.met = 0
        self._bits: dict[str, NDArray[np.uint8]] = {}  # (2, bytes): kept by one at least, by two at least

    def add(self, delta: Delta) -> None:
        for name, part in delta.parts.items():
            if part.mask == "dense":
                continue
            bits = self._bits.setdefault(name, np.zeros((2, -(-part.size // 8)), dtype=np.uint8))
            walk = delta.walk(name)
            for start in range(0, part.size, CHUNK):
                stop = min(start + CHUNK, part.size)
                new = np.zeros(stop - start, dtype=np.bool_)
                new[walk.until(stop)[0]] = True
                held = bits[:, start // 8 : -(-stop // 8)]
                once, twice = np.unpackbits(held, axis=1, count=stop - start).astype(np.bool_)
                self.kept += int(np.count_nonzero(new & ~once))
                self.met += int(np.count_nonzero(new & once & ~twice))
                held[1] |= np.packbits(new & once)
                held[0] |= np.packbits(new)


def overlap(deltas: Sequence[Delta]) -> Overlap:
    """Count the collisions of deltas.

    Raises:
        DeltaError: they belong to different base models, or two have the same task key.
    """
    check_compatible(deltas, deltas[0].base if deltas else "")
    K = len(deltas)
    common, hits = np.zeros((K, K), dtype=np.int64), np.zeros(K + 1, dtype=np.int64)
    masked = {name: part.size for delta in deltas for name, part in delta.parts.items() if part.mask != "dense"}
    for name, size in masked.items():
        walks = [
            (k, delta.walk(name))
            for k, delta in enumerate(deltas)
            if name in delta.parts and delta.parts[name].mask != "dense"
        ]
        for start in range(0, size, CHUNK):
            stop = min(start + CHUNK, size)
            m = np.zeros((K, stop - start), dtype=np.float32)  # K x chunk, 0 or 1
            for k, walk in walks:
                m[k, walk.until(stop)[0]] = 1
            common += (m @ m.T).astype(np.int64)  # exact: a chunk is far below 2^24
            hits += np.bincount(m.sum(0).astype(np.intp), minlength=K + 1)
    return Overlap(common, hits)
