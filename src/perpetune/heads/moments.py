"""Heads made of second moments of mapped features, in two folds: what ridge and discriminant analysis share."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..core.errors import ConfigError, HeadError
from ..core.measurement import Measurement
from .base import matmul_dtype
from .exact_sums import EXACT_BITS, FixedPoint, check_room, exact_matmul
from .feature_maps import FeatureMap
from .holdout import HoldoutMoments
from .readout import Readout
from .statistics import Shape, StatisticsHead

ROWS = 4096  # samples mapped at a time: bounds memory at ROWS x M


class MomentsHead(StatisticsHead):
    """G = sum h h^T and Q = sum h y^T (y one-hot) of h = map(f), and counts, of a train and a hold-out fold.

    To which fold a sample belongs is a hash of its id. Everything that is summed is rounded to fixed point first: the
    statistics and whatever is computed of them have identical bits under any order of tasks, classes and samples, any
    batch size and any split; a sample is taken out exactly. Stored: 4 M^2 bytes for each fold (8 MB at M = 1,024).

    A subclass gives the `maps`, by the prefix of their sums, and `fit`. Scores are h Theta + `offset`.
    """

    class_axis: ClassVar[Mapping[str, int]] = {"cross": 1, "counts": 1, "shards": 0, "shard_counts": 0}
    symmetric: ClassVar[frozenset[str]] = frozenset({"gram"})
    holdout: float
    bits: int
    shards: int = 0  # parts of a class's hold-out whose sums are kept apart, see `HoldoutMoments`

    def check_moments(self) -> None:
        if not 0 < self.holdout < 1:
            raise ConfigError(f"head `{self.name}`: holdout={self.holdout}; give a share between 0 and 1")
        if self.shards < 0:
            raise ConfigError(f"head `{self.name}`: shards={self.shards}; give their number, or 0 for none")
        if not 8 <= self.bits <= 24:
            raise ConfigError(f"head `{self.name}`: bits={self.bits}; give 8 to 24")

    def check_strength(self, name: str, value: float | None) -> None:
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ConfigError(f"head `{self.name}`: {name}={value}; give a positive number, or none to choose")

    @property
    def folds(self) -> int:
        """A head with nothing left to choose needs no hold-out."""
        return 2

    @property
    def _shards(self) -> int:
        return self.shards if self.folds == 2 else 0

    def make_maps(self) -> dict[str, FeatureMap]:
        """The maps of the open head, by the prefix of the names of their sums."""
        raise NotImplementedError

    def shapes(self, classes: int) -> dict[str, Shape]:
        shapes: dict[str, Shape] = {}
        for prefix, feature_map in self.maps.items():
            m = feature_map.size
            shapes[f"{prefix}gram"] = torch.float64, (self.folds, m, m)  # G, in steps^2; [0] train, [1] hold-out
            shapes[f"{prefix}cross"] = torch.float64, (self.folds, classes, m)  # Q^T, in steps
            if self._shards:
                shapes[f"{prefix}shards"] = torch.float64, (classes, self._shards, m)  # in steps
        shapes["counts"] = torch.int64, (self.folds, classes)
        if self._shards:
            shapes["shard_counts"] = torch.int64, (classes, self._shards)
        shapes["clipped"] = torch.int64, (2,)  # clipped entries, all entries
        return shapes

    def open(self, width: int, labels: Sequence[str], *, seed: int, label_embeddings: Tensor | None = None) -> None:
        self.width, self.seed = width, seed
        self.maps = self.make_maps()
        super().open(width, labels, seed=seed)

    def changed(self) -> None:
        self._fitted: tuple[list[int], Tensor, float] | None = None

    @property
    def chosen(self) -> FeatureMap:
        """The map that `fit` reads."""
        return next(iter(self.maps.values()))

    @property
    def grid(self) -> FixedPoint:
        return self.chosen.grid

    @property
    def unit(self) -> float:
        return self.chosen.unit

    @property
    def W(self) -> Tensor | None:
        return self.chosen.W

    def check_samples(self, samples: int) -> None:
        check_room(self.grid, samples, 2, self.name, "give the head fewer samples, or fewer `bits`")

    def expand(self, features: Tensor) -> tuple[Tensor, int]:
        """h in steps, (N x M), integers in fp64, and the number of clipped entries."""
        return self.chosen.steps(features)

    def observe(self, features: Tensor, labels: Tensor, ids: Sequence[str]) -> None:
        features, labels = self.checked_samples(features, labels, ids)
        self.check_samples(int(self.class_counts().sum()) + len(labels))
        fold = torch.tensor([self.folds == 2 and in_holdout(i, self.holdout) for i in ids], dtype=torch.long)
        s, classes = self.statistics, len(self.labels)
        part = labels * self._shards + torch.tensor([shard(i, self._shards) for i in ids], dtype=torch.long)
        for rows in torch.arange(len(labels)).split(ROWS):
            mine = [(k, fold[rows] == k) for k in range(self.folds)]
            for k, of_k in mine:
                s["counts"][k] += torch.bincount(labels[rows][of_k], minlength=classes)
            held = part[rows][fold[rows] == 1]
            if self._shards:
                counted = torch.bincount(held, minlength=classes * self._shards)
                s["shard_counts"] += counted.reshape(classes, self._shards)
            for prefix, feature_map in self.maps.items():
                h, clipped = feature_map.steps(features[rows])
                s["clipped"] += torch.tensor([clipped, h.numel() + len(rows) * self.width])
                for k, of_k in mine:
                    s[f"{prefix}gram"][k].addmm_(h[of_k].T, h[of_k])
                    s[f"{prefix}cross"][k].index_add_(0, labels[rows][of_k], h[of_k])
                if self._shards:
                    s[f"{prefix}shards"].flatten(0, 1).index_add_(0, held, h[fold[rows] == 1])
        self.changed()

    def seen(self) -> list[int]:
        """The classes seen, sorted by label text, so that what is fitted has bits that depend on the samples alone."""
        n_c = self.class_counts()
        return sorted((c for c in range(len(self.labels)) if n_c[c] > 0), key=lambda c: self.labels[c])

    def moments(self, seen: Sequence[int], prefix: str = "") -> tuple[Tensor, Tensor, Tensor]:
        """G (folds x M x M), Q (folds x M x k) and counts (folds x k), of some classes, in units of h."""
        unit = self.maps[prefix].unit
        G = self.statistics[f"{prefix}gram"] * unit**2
        Q = self.statistics[f"{prefix}cross"][:, seen].mT.contiguous() * unit
        return G, Q, self.statistics["counts"][:, seen]

    def holdout_moments(self, seen: Sequence[int], prefix: str = "", features: int | None = None) -> HoldoutMoments:
        """The hold-out fold as `HoldoutMoments` reads it, of the first of the features."""
        G, Q, n = (sums[1] for sums in self.moments(seen, prefix))
        moments = G[:features, :features], Q[:features], n
        if not self._shards:
            return HoldoutMoments(*moments)
        sums = self.statistics[f"{prefix}shards"][seen][..., :features] * self.maps[prefix].unit
        return HoldoutMoments(*moments, sums, self.statistics["shard_counts"][seen])

    def fit(self) -> tuple[list[int], Tensor, float]:
        """Classes seen (k of them), Theta (M x k), strength. Computed once after each change."""
        raise NotImplementedError

    def offset(self) -> Tensor | None:
        """What is added to h Theta, (k,), after `fit`."""
        return None

    def scores(self, features: Tensor, task: int | None = None) -> Tensor:
        features, device = self.checked_queries(features), features.device
        scores = torch.full((len(features), len(self.labels)), -torch.inf, dtype=torch.float64)
        if self.class_counts().any():
            seen, Theta, _ = self.fit()
            h, _ = self.expand(features)
            s, offset = exact_matmul(h, self.bits, Theta) * self.unit, self.offset()
            scores[:, seen] = s if offset is None else s + offset
        return scores.to(matmul_dtype(device)).to(device)

    def readout(self, classes: Sequence[int], task: int | None = None) -> Readout | None:
        """See `Head.readout`: random features are not linear."""
        seen, Theta, _ = self.fit()
        if self.chosen.random:
            return None
        rows, offset = [seen.index(c) for c in self.checked_classes(classes)], self.offset()
        bias = torch.zeros(len(rows)) if offset is None else offset[rows].float()
        return Readout(Theta.T[rows].float(), bias, normalised=self.chosen.normalises)

    def state(self) -> dict[str, Tensor]:
        return {**super().state(), "seed": torch.tensor(self.seed), "bits": torch.tensor(self.bits)}

    def _stored(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        random = any(feature_map.random for feature_map in self.maps.values())
        for name, ours in (("bits", self.bits), ("seed", self.seed)):
            found = int(self.take(state, name, ()))
            if found != ours and (name == "bits" or random):
                raise HeadError(
                    f"head `{self.name}` no longer fits its checkpoint: expected random features of {name} {ours}, "
                    f"found {name} {found}; use the settings that the checkpoint was made with"
                )
        return super()._stored(state)

    def guarantee(self) -> list[Measurement]:
        n, source = int(self.class_counts().sum()), type(self).__name__
        noise = 0.0
        for prefix in self.maps if n else ():
            gram = self.statistics[f"{prefix}gram"]
            energy = float(gram.diagonal(dim1=-2, dim2=-1).sum())  # sum of h^2, in steps^2
            noise = max(noise, math.sqrt(n * gram.shape[-1] / 12 / max(energy, 1e-300)))
        return [
            Measurement(
                "bits of the largest sum", self.grid.used_bits(n, 2), EXACT_BITS, "bits", source,
                "Below 53 the head has the same bits in any order of tasks and for any batch size.",
            ),
            Measurement(
                "clipped entries", self.clipped_share(), 1e-3, "share", source,
                "Entries beyond the range of the fixed grid are cut off; many of them would change predictions.",
            ),
            Measurement(
                "rounding of random features", noise, 1e-2, "relative", source,
                "Random features are rounded to a fixed grid so that sums are exact; tiny ones would lose precision.",
            ),
        ]  # fmt: skip


def in_holdout(sample_id: str, share: float) -> bool:
    """Whether a sample belongs to the hold-out: by its id alone, not by its position."""
    return int.from_bytes(hashlib.sha256(sample_id.encode()).digest()[:8], "big") < share * 2**64


def shard(sample_id: str, of: int) -> int:
    """To which of so many shards of the hold-out a sample belongs: by its id alone."""
    return int.from_bytes(hashlib.sha256(sample_id.encode()).digest()[8:16], "big") % of if of else 0
