"""Linear discriminant analysis with one shrunk covariance and equal priors, from the sums that ridge keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.measurement import Measurement
from .feature_maps import FeatureMap, Kind, check_map
from .holdout import Linear
from .moments import MomentsHead
from .ridge import FEWEST

SHRINKAGES = tuple(10.0 ** (k / 2) for k in range(-6, 1))  # 1e-3 ... 1, two points per decade
DEFAULT = 1e-1  # without a hold-out
SHARDS = 16  # of each class's hold-out
EQUAL = 1e-4  # expected accuracies that are closer than this are equal


class LDAHead(MomentsHead):
    """Linear discriminant analysis, with order-free statistics: those of `RidgeHead`, read otherwise.

    h = map(f) in R^M; m_c = Q_c / n_c; the within-class covariance is shrunk towards a multiple of the identity:

        S = (G - sum_c n_c m_c m_c^T) / (n - C),    S_a = (1 - a) S + a (tr S / M) I,
        scores s_c = m_c^T S_a^-1 h - m_c^T S_a^-1 m_c / 2:

    the log-posterior under Gaussians of equal covariance and equal priors, up to a constant of the sample. a has the
    highest expected accuracy on the hold-out fold under the fit on the train fold (`HoldoutMoments`), from moments
    alone; the final fit is on both folds. Where classes are not equally frequent, equal priors favour the rare.

    Args:
        map: what h is, see `FeatureMap`; features: M, where the map is random.
        shrinkage: a in (0, 1]; None to choose it. With fewer than 10 samples in either fold it is 0.1.
        holdout: share of the samples that choose a.
        bits: see `RidgeHead`; gamma: of the kernel, see `FeatureMap`; refresh: see `StatisticsHead`.
        shards: of each class's hold-out, see `HoldoutMoments`; 128 M bytes for a class at 16.

    Raises:
        ConfigError: an argument out of range.
    """

    name = "lda"

    def __init__(
        self,
        map: Kind = "raw",
        features: int = 1024,
        shrinkage: float | None = None,
        holdout: float = 0.2,
        bits: int = 17,
        gamma: float = 1.0,
        refresh: bool = False,
        shards: int = SHARDS,
    ) -> None:
        super().__init__(refresh)
        self.shards = shards
        self.map, self.features, self.shrinkage, self.holdout, self.bits = map, features, shrinkage, holdout, bits
        self.gamma = gamma
        check_map(self.name, map, features, bits, gamma)
        self.check_moments()
        self.check_strength("shrinkage", shrinkage)

    @property
    def folds(self) -> int:
        """A shrinkage that is given needs no hold-out."""
        return 2 if self.shrinkage is None else 1

    def make_maps(self) -> dict[str, FeatureMap]:
        return {"": FeatureMap(self.map, self.width, self.features, self.seed, self.bits, self.gamma)}

    def fit(self) -> tuple[list[int], Tensor, float]:
        """See `MomentsHead.fit`; the strength is a."""
        if self._fitted is None:
            seen = self.seen()
            G, Q, n = self.moments(seen)
            a = self.shrinkage if self.shrinkage is not None else self.choose(G, Q, n)
            Theta, self._offset = self.linear(G.sum(0), Q.sum(0), n.sum(0), a)
            self._fitted = seen, Theta, a
        return self._fitted

    def linear(self, G: Tensor, Q: Tensor, n: Tensor, shrinkage: float) -> Linear:
        """The read-out of these sums, (M x M), (M x k), (k,): after `fit`, with what it chose."""
        return Discriminant(G, Q, n).solve(shrinkage)

    def choose(self, G: Tensor, Q: Tensor, n: Tensor) -> float:
        """The shrinkage of the grid with the best expected accuracy on the hold-out; of equals, the largest."""
        if int(n.sum(1).min()) < FEWEST:
            return DEFAULT
        train, holdout = Discriminant(G[0], Q[0], n[0]), self.holdout_moments(self.seen())
        found = holdout.accuracies(train.solve(a) for a in SHRINKAGES)
        return max(a for a, accuracy in zip(SHRINKAGES, found, strict=True) if accuracy >= max(found) - EQUAL)

    def offset(self) -> Tensor | None:
        return self._offset

    def guarantee(self) -> list[Measurement]:
        measured = super().guarantee()
        if self.class_counts().any():
            note = "The shrinkage of the covariance, given or chosen from a hold-out over all tasks so far."
            measured.append(Measurement("shrinkage", self.fit()[2], None, "", type(self).__name__, note))
        return measured


class KLDAHead(LDAHead):
    """KLDA: `LDAHead` on random Fourier features of the Gaussian kernel exp(-gamma |f - g|^2), of features of length 1.

    Source: Momeni et al., Continual Learning Using a Kernel-Based Method Over Foundation Models, 2412.15571. Published,
    and in its released code: 5,000 of them, of the features as they are (map="kernel"), gamma chosen for every encoder
    (1e-4, 1e-2), and in the place of shrinkage a ridge of 1e-4 or 1e-3 on S, which is not divided by n.
    """

    name = "klda"

    def __init__(
        self,
        features: int = 1024,
        gamma: float = 0.3,
        map: Kind = "kernel_normalised",
        shrinkage: float | None = None,
        holdout: float = 0.2,
        bits: int = 17,
        refresh: bool = False,
        shards: int = SHARDS,
    ) -> None:
        super().__init__(map, features, shrinkage, holdout, bits, gamma, refresh, shards)


class Discriminant:
    """Discriminants for any shrinkage.

    Args:
        G: sum h h^T, (M x M); Q: sums of h by class, (M x C); n: counts, (C,). Classes without samples score as if
            their mean were 0.
    """

    def __init__(self, G: Tensor, Q: Tensor, n: Tensor) -> None:
        self.means = Q / n.clamp(min=1)  # (M x C)
        S = (G - self.means @ Q.T) / max(int(n.sum()) - int((n > 0).sum()), 1)
        self.S = (S + S.T) / 2

    def solve(self, shrinkage: float) -> tuple[Tensor, Tensor]:
        """Theta = S_a^-1 m, (M x C), and the offsets -m^T S_a^-1 m / 2, (C,)."""
        level = float(self.S.diagonal().mean())
        if not level > 0:  # one sample a class: the nearest mean
            return self.means, -0.5 * self.means.square().sum(0)
        S_a = (1 - shrinkage) * self.S
        S_a.diagonal().add_(shrinkage * level)
        Theta = torch.cholesky_solve(self.means, torch.linalg.cholesky(S_a))
        return Theta, -0.5 * (self.means * Theta).sum(0)
