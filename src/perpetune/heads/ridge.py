"""Ridge regression on random features: RanPAC's head, from sums that do not depend on the order of tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.errors import ConfigError
from ..core.measurement import Measurement
from .feature_maps import FeatureMap, Kind, check_map
from .moments import MomentsHead, in_holdout

__all__ = ["FEWEST", "GRID", "RidgeHead", "choose_penalty", "holdout_errors", "in_holdout", "solve"]

GRID = tuple(10.0 ** (k / 4) for k in range(-32, 33))  # 1e-8 ... 1e8, four points per decade
FEWEST = 10  # samples a fold needs before a hold-out error says anything


class RidgeHead(MomentsHead):
    """Ridge regression on random features (RanPAC, 2307.02251), with order-free statistics.

    h = relu(f W) in R^M, W ~ N(0, 1)^{L x M} from the seed; G = sum h h^T, Q = sum h y^T (y one-hot);
    Theta = (G + lambda I)^-1 Q, scores h Theta. G and Q are kept for two folds, train and hold-out, to which a sample
    belongs by a hash of its id. lambda minimises the hold-out error, from moments alone (`holdout_errors`); the final
    fit is on both folds. Everything that is summed is rounded to fixed point first: the statistics, lambda, Theta and
    the scores have identical bits under any order of tasks, classes, samples, and any batch size.

    Differs from the paper and its code: lambda is chosen from a hold-out over all tasks (theirs: from the last task
    alone, which makes the head depend on the order) on a grid of four points per decade (one); M is 1,024 (10,000:
    statistics cost M^2 and a fit M^3); h is scaled by the power of two nearest to 1/sqrt(L), which centres the grid
    and is otherwise immaterial as lambda is tuned. W is an Irwin-Hall sum, see `gaussian_steps`.

    Args:
        features: M; 0 for ridge on the features as they are (no projection, no relu).
        regularisation: lambda, in units of the scaled h; None to choose it. With fewer than 10 samples in either
            fold, or where every lambda of the grid does equally well, it is a tenth of the mean |h|^2, on the grid.
        holdout: share of the samples that choose lambda.
        bits: of the grid on which h is rounded, over a fixed range (0..512 before scaling; +-32 where `features` is
            0). 2 * bits + log2(n) must stay below 53: 17 bits allow 524,287 samples, 16 bits four times as many.
        refresh: see `StatisticsHead`.
        map: what h is, see `FeatureMap`; None: "relu", or "raw" where `features` is 0.
        gamma: of the kernel, see `FeatureMap`.

    Raises:
        ConfigError: an argument out of range.
    """

    name = "ridge"
    unwritten: ClassVar[dict[str, Any]] = {"map": None, "gamma": 1.0}

    def __init__(
        self,
        features: int = 1024,
        regularisation: float | None = None,
        holdout: float = 0.2,
        bits: int = 17,
        refresh: bool = False,
        map: Kind | None = None,
        gamma: float = 1.0,
    ) -> None:
        super().__init__(refresh)
        if features < 0:
            raise ConfigError(f"ridge head: features={features}; give their number, or 0 for none")
        self.features, self.regularisation, self.holdout, self.bits = features, regularisation, holdout, bits
        self.map, self.gamma = map, gamma
        check_map(self.name, self.kind, features, bits, gamma)
        self.check_moments()
        self.check_strength("regularisation", regularisation)

    @property
    def kind(self) -> Kind:
        return self.map or ("relu" if self.features else "raw")

    @property
    def folds(self) -> int:
        """A lambda that is given needs no hold-out."""
        return 2 if self.regularisation is None else 1

    def make_maps(self) -> dict[str, FeatureMap]:
        return {"": FeatureMap(self.kind, self.width, self.features, self.seed, self.bits, self.gamma)}

    def fit(self) -> tuple[list[int], Tensor, float]:
        """See `MomentsHead.fit`; the strength is lambda."""
        if self._fitted is None:
            seen = self.seen()
            G, Q, _ = self.moments(seen)
            n = self.statistics["counts"].sum(1).tolist()
            penalty = self.regularisation if self.regularisation is not None else choose_penalty(G, Q, n)
            self._fitted = seen, solve(G.sum(0), Q.sum(0), penalty), penalty
        return self._fitted

    def guarantee(self) -> list[Measurement]:
        measured = super().guarantee()
        if self.class_counts().any():
            note = "The ridge strength, given or chosen from a hold-out over all tasks so far."
            measured.append(Measurement("regularisation", self.fit()[2], None, "", type(self).__name__, note))
        return measured


def spectrum(G: Tensor) -> tuple[Tensor, Tensor]:
    """G = U diag(d) U^T; directions that no sample has (d below rounding) get d = inf, so that 1 / (d + lambda) = 0.

    Q lies in the range of G: nothing is lost by leaving them out, and rounding noise is not divided by a small lambda.
    """
    d, U = torch.linalg.eigh(G)
    return torch.where(d > rounding(G), d, torch.inf), U


def rounding(G: Tensor) -> float:
    """Eigenvalues of G (M x M) below this are rounding: M * 2^-52 * tr(G)."""
    return len(G) * torch.finfo(G.dtype).eps * float(G.trace())


def holdout_errors(G: Tensor, Q: Tensor, n_v: int, penalties: Sequence[float]) -> Tensor:
    """Hold-out mean squared error of Theta = (G_tr + lambda I)^-1 Q_tr for every lambda, from moments alone.

    [tr(Theta^T G_v Theta) - 2 tr(Theta^T Q_v) + n_v] / (n_v C), with G = (G_tr, G_v) of shape (2 x M x M) and
    Q = (Q_tr, Q_v) of shape (2 x M x C).
    In the eigenbasis of G_tr, with r = 1 / (d + lambda), the traces are r^T ((U^T G_v U) o (Z Z^T)) r and
    r . rowsum(Z o U^T Q_v), Z = U^T Q_tr: one decomposition, then M^2 operations per lambda.
    """
    d, U = spectrum(G[0])
    Z = U.T @ Q[0]  # (M, C)
    K = (U.T @ G[1] @ U) * (Z @ Z.T)  # (M, M)
    z = (Z * (U.T @ Q[1])).sum(1)  # (M,)
    R = 1 / (d[None] + torch.tensor(penalties, dtype=d.dtype)[:, None])  # (penalties, M)
    return (((R @ K) * R).sum(1) - 2 * R @ z + n_v) / (n_v * Q.shape[-1])


def choose_penalty(G: Tensor, Q: Tensor, n: Sequence[int]) -> float:
    """The lambda of the grid with the least hold-out error; of equals (to 1e-9 of the error of Theta = 0), the largest.

    Too few samples (n = (n_tr, n_v)), or no difference between any two: a tenth of the mean |h|^2, on the grid.
    """
    if min(n) >= FEWEST:
        errors = holdout_errors(G, Q, n[1], GRID)
        equal = 1e-9 / Q.shape[-1]
        if errors.max() - errors.min() > equal:
            return max(p for p, e in zip(GRID, errors.tolist(), strict=True) if e <= float(errors.min()) + equal)
    scale = 0.1 * float(G.diagonal(dim1=-2, dim2=-1).sum()) / max(sum(n), 1)
    return min(GRID, key=lambda p: abs(math.log10(p) - math.log10(max(scale, GRID[0]))))


def solve(G: Tensor, Q: Tensor, penalty: float) -> Tensor:
    """Theta = (G + lambda I)^-1 Q, (M x C). Cholesky, or by the spectrum where lambda drowns in rounding."""
    if penalty > rounding(G):
        return torch.cholesky_solve(Q, torch.linalg.cholesky(G + penalty * torch.eye(len(G), dtype=G.dtype)))
    d, U = spectrum(G)
    return U @ ((U.T @ Q) / (d + penalty)[:, None])
