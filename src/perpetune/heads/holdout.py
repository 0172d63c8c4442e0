"""How well a linear read-out would do on a hold-out of which only moments are known."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

DRAWS = 2**14  # of all classes together: a standard error of about 0.25 points at an accuracy of 90 %
FEWEST_DRAWS = 32  # of a class
ENTRIES = 2**21  # numbers held at a time
FEW_DRAWS, FEW_ENTRIES = 2**11, 2**19  # of all classes, and numbers in them, where the first classes tell enough
TEMPERATURES = torch.logspace(-1, 2, 61, dtype=torch.float64)  # 20 a decade
STRIDE = 8  # of the values that are tried first

Linear = tuple[Tensor, Tensor | None]  # Theta (M x C), offsets (C,)


class HoldoutMoments:
    """Each class of a hold-out as a Gaussian N(m_c, S_c), m_c = Q_c / n_c.

    S_c = a S + (1 - a) D_c: S = (G - sum_c n_c m_c m_c^T) / (n - C) is common to all. D_c is of the class alone, from
    the sums q_cb of its samples in each of B shards, n_cb of them, to which they belong by a hash of their ids:

        D_c = sum_b d_cb d_cb^T / (B - 1),   d_cb = (q_cb - n_cb m_c) / sqrt(n_cb),   a = 1 / B

    (B: shards with samples). Without shards a = 1; where classes are confused in pairs, S alone, in which such a pair
    hardly counts, makes every read-out look perfect (docs/results/frozen_heads.md). Scores h Theta + b of a class are
    drawn from their Gaussian. The draws are seeded and shared by all read-outs, which may differ in everything: this
    compares ridge with discriminant analysis, and one feature map with another. Classes count by their samples.

    Args:
        G: sum h h^T over the hold-out, (M x M); Q: by class, (M x C); n: counts, (C,).
        shards: q_cb, (C x B x M); shard_counts: n_cb, (C x B).
    """

    def __init__(
        self, G: Tensor, Q: Tensor, n: Tensor, shards: Tensor | None = None, shard_counts: Tensor | None = None
    ) -> None:
        self.present = (n > 0).nonzero().flatten()
        self.n = n[self.present].to(torch.float64)
        self.means = Q[:, self.present] / self.n
        degrees = max(float(self.n.sum()) - len(self.present), 1.0)
        self.S = (G - self.means @ Q[:, self.present].T) / degrees
        self.D: Tensor | None = None
        if shards is not None and shard_counts is not None:
            n_b = shard_counts[self.present].to(torch.float64)[..., None]
            d = (shards[self.present] - n_b * self.means.T[:, None]) / n_b.clamp(min=1).sqrt()
            filled = (n_b > 0).sum(1, keepdim=True).to(torch.float64)  # (present, 1, 1)
            self.D = d / (filled - 1).clamp(min=1).sqrt()
            self.own = torch.where(filled > 1, 1 - 1 / filled, torch.zeros((), dtype=d.dtype))

    def accuracies(self, candidates: Iterable[Linear]) -> list[float]:
        """The share of hold-out samples that argmax_c (h Theta + b)_c would get right, of each candidate."""
        found = []
        for linear in candidates:
            right = 0.0
            for s, own, weight in self._drawn(linear):
                right += float(((s.argmax(2) == own[:, None]).double().mean(1) * weight).sum())
            found.append(right / float(self.n.sum()))
        return found

    def temperature(self, linear: Linear) -> float:
        """tau of the grid with the least expected log-loss of softmax_c ((h Theta + b)_c / tau)."""
        return self.calibrated(linear)[0]

    def calibrated(self, linear: Linear, groups: Tensor | None = None, shown: int | None = None) -> tuple[float, float]:
        """tau of the grid with the least expected log-loss of softmax_c ((h Theta + b)_c / tau), and this loss in nats.

        It is convex in 1 / tau of a class, and nearly so of a group: a few values of the grid tell between which of
        them the least one lies.

        Args:
            groups: of each class, what it belongs to (C,): the loss of the group, whose classes are added up.
            shown: so many classes, the first, tell how it does on all.
        """
        least = int(self.log_losses(linear, TEMPERATURES[::STRIDE], groups, shown).argmin()) * STRIDE
        near = TEMPERATURES[max(0, least - STRIDE + 1) : least + STRIDE]
        losses = self.log_losses(linear, near, groups, shown)
        return float(near[losses.argmin()]), float(losses.min())

    def log_losses(
        self,
        linear: Linear,
        temperatures: Tensor = TEMPERATURES,
        groups: Tensor | None = None,
        shown: int | None = None,
    ) -> Tensor:
        """That log-loss, in nats a sample, for each tau, (61,)."""
        losses = torch.zeros(len(temperatures), dtype=torch.float64)
        for s, own, weight in self._drawn(linear, shown):
            of_own = s.gather(2, own[:, None, None].expand(-1, s.shape[1], 1))[..., 0]
            others = None if groups is None else (groups[own][:, None] != groups)[:, None]  # (k x 1 x C)
            for k, tau in enumerate(temperatures):
                right = of_own / tau
                if others is not None:
                    right = (s / tau).masked_fill(others, -torch.inf).logsumexp(2)
                losses[k] += (((s / tau).logsumexp(2) - right).mean(1) * weight).sum()
        return losses / float(self.n[:shown].sum())

    def _drawn(self, linear: Linear, shown: int | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Scores of some classes at a time (k x draws x C), their indices (k,) and weights (k,)."""
        Theta, offset = linear
        centres = self.means.T @ Theta  # (present x C)
        if offset is not None:
            centres = centres + offset
        d, U = torch.linalg.eigh(Theta.T @ self.S @ Theta)
        root = U * d.clamp(min=0).sqrt()  # root root^T = Theta^T S Theta
        count = len(self.present[:shown])
        C = len(root)
        if shown is None:
            draws = max(FEWEST_DRAWS, DRAWS // count)
        else:
            draws = max(1, min(FEW_DRAWS // count, FEW_ENTRIES // (count * C)))
        D = None if self.D is None else self.D @ Theta  # (present x B x C)
        shards = 0 if D is None else D.shape[1]
        parts = torch.arange(count).split(max(1, ENTRIES // (draws * C)))
        g = torch.Generator().manual_seed(0)
        for rows in parts:
            size = (len(rows), draws, C, shards)
            z, e = _only_normals(*size) if len(parts) == 1 else _normals(*size, g)
            z = z @ root.T
            if D is not None:
                z = self.own[rows].sqrt() * (e @ D[rows]) + (1 - self.own[rows]).sqrt() * z
            yield centres[rows][:, None] + z, self.present[rows], self.n[rows]


def _normals(classes: int, draws: int, C: int, shards: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Standard normal numbers, (classes x draws x C) and (classes x draws x shards)."""
    z = torch.randn(classes, draws, C, generator=g, dtype=torch.float64)
    return z, torch.randn(classes, draws, shards, generator=g, dtype=torch.float64)


@functools.lru_cache(maxsize=2)
def _only_normals(classes: int, draws: int, C: int, shards: int) -> tuple[Tensor, Tensor]:
    """Those of all classes at once, kept (at most `ENTRIES`, 16 MB): drawing them takes ten times as long as all else
    that is done for a read-out, and a head compares dozens."""
    return _normals(classes, draws, C, shards, torch.Generator().manual_seed(0))
