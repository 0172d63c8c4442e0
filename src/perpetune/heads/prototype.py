"""Nearest class mean: the prediction is the class whose mean feature points the same way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..core.measurement import Measurement
from .base import matmul_dtype
from .exact_sums import EXACT_BITS, FEATURES, check_room, exact_matmul
from .readout import Readout
from .statistics import Shape, StatisticsHead


class PrototypeHead(StatisticsHead):
    """Nearest class mean (NCM; SimpleCIL, 2303.07338).

    State per class c: S_c = sum of f(x), n_c = number of samples. Scores (N x C): cos(f(x), S_c / n_c), which is
    cos(f(x), S_c). A class without samples scores -inf; a mean of exactly zero, or a feature of exactly zero, scores 0.

    Released code overwrites the prototype of a class that reappears; sums and counts do not. The sums are exact in
    fixed point (steps of 2^-18, |f| < 128): identical bits under any order of tasks, batch size or sharding.
    """

    name = "ncm"
    class_axis: ClassVar[Mapping[str, int]] = {"sums": 0, "counts": 0}

    def shapes(self, classes: int) -> dict[str, Shape]:
        return {
            "sums": (torch.float64, (classes, self.width)),  # S, in steps
            "counts": (torch.int64, (classes,)),  # n
            "clipped": (torch.int64, (2,)),  # clipped entries, all entries
        }

    def check_samples(self, samples: int) -> None:
        check_room(FEATURES, samples, 1, self.name, "use fewer samples")

    def observe(self, features: Tensor, labels: Tensor, ids: Sequence[str]) -> None:
        features, labels = self.checked_samples(features, labels, ids)
        self.check_samples(int(self.class_counts().sum()) + len(labels))
        f, clipped = FEATURES.steps(features)
        self.statistics["sums"].index_add_(0, labels, f)
        self.statistics["counts"] += torch.bincount(labels, minlength=len(self.labels))
        self.statistics["clipped"] += torch.tensor([clipped, f.numel()])

    def scores(self, features: Tensor, task: int | None = None) -> Tensor:
        f, _ = FEATURES.steps(self.checked_queries(features))
        S = self.statistics["sums"]  # (C, L)
        S = S / _nonzero(torch.linalg.vector_norm(S, dim=1))[:, None]
        # Integers: the norm of a row has the same bits whatever stands in the other rows.
        norm = f.long().square().sum(1).to(torch.float64).sqrt()
        scores = exact_matmul(f, FEATURES.bits, S.T) / _nonzero(norm)[:, None]
        scores[:, self.class_counts() == 0] = -torch.inf
        return scores.to(matmul_dtype(features.device)).to(features.device)

    def readout(self, classes: Sequence[int], task: int | None = None) -> Readout | None:
        S = self.statistics["sums"][self.checked_classes(classes)]
        weight = (S / _nonzero(torch.linalg.vector_norm(S, dim=1))[:, None]).float()
        return Readout(weight, torch.zeros(len(weight)), normalised=True)

    def guarantee(self) -> list[Measurement]:
        n = int(self.class_counts().sum())
        noise = (n * self.width / 12) ** 0.5 / max(float(self.statistics["sums"].norm()), 1e-300) if n else 0.0
        source = type(self).__name__
        return [
            Measurement(
                "bits of the largest sum", FEATURES.used_bits(n, 1), EXACT_BITS, "bits", source,
                "Below 53 the class means have the same bits in any order of tasks and for any batch size.",
            ),
            Measurement(
                "clipped feature entries", self.clipped_share(), 1e-3, "share", source,
                "Entries beyond 128 are cut off; many of them would change predictions.",
            ),
            Measurement(
                "rounding of class means", noise, 1e-3, "relative", source,
                "Features are rounded to a fixed grid so that sums are exact; tiny features would lose precision.",
            ),
        ]  # fmt: skip


def _nonzero(norm: Tensor) -> Tensor:
    return norm.where(norm > 0, torch.ones((), dtype=norm.dtype))
