"""AnaCP: a contrastive projection in closed form before ridge, from sums that do not depend on the order of tasks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..core.errors import ConfigError
from .exact_sums import FixedPoint, exact_matmul
from .feature_maps import FeatureMap, check_map
from .moments import MomentsHead
from .ridge import solve

PROJECTED = FixedPoint(bits=24, step=2.0**-22)  # projections regress on targets of length 1: entries stay below 4
JITTER = 1e-4  # added to the covariance of features of length 1


class AnaCPHead(MomentsHead):
    """Analytic contrastive projection (Momeni, Xiao and Liu, 2511.13880), then ridge on its random features.

    x = f / |f|; mu_c and S are the class means and the within-class covariance of x (plus 1e-4 I).

        targets      W = S^-1/2, U diag(s) V^T = (mu - mean mu) W, t_c = normalise(U diag(s + 1) V^T W + mean mu)_c:
                     means pushed apart along every direction in which they differ
        projection   z_k = gelu(x R_k), theta_k = (sum z_k z_k^T + lambda I)^-1 sum_c (sum of z_k in c) t_c^T,
                     p(x) = mean_k normalise(theta_k^T z_k), k = 1 .. `layers`
        read-out     h = gelu(p R_0), Theta by ridge (lambda) on `replay` samples of N(mu_c, S) for each class

    R_0, R_1, ... ~ N(0, 1). This is the released code (SalehMomeni/AnaCP). The released code also pushes apart along a
    direction in which the means do not differ at all (their mean is taken off, so one s is 0): here it is left out.
    No sample is kept: the replayed ones are drawn anew at every fit, from the seed. Published: M = 5,000, 3 layers,
    lambda 100, after adaptation to the first task (`FirstTask`); M is 1,024 here. S of all tasks is the sum about the
    final means; the released code centres every task by the means of its day. Statistics, fit and scores have the same
    bits under any order of tasks and for any batch size. Stored: 4 M^2 bytes for every layer.

    Args:
        features: M; layers: how many projections are averaged; regularisation: lambda.
        replay: samples drawn for each class.
        bits: see `RidgeHead`; refresh: see `StatisticsHead`.

    Raises:
        ConfigError: an argument out of range.
    """

    name = "anacp"
    holdout = 0.5  # there is no hold-out

    def __init__(
        self,
        features: int = 1024,
        layers: int = 3,
        regularisation: float = 100.0,
        replay: int = 100,
        bits: int = 17,
        refresh: bool = False,
    ) -> None:
        super().__init__(refresh)
        if layers < 1 or replay < 1:
            raise ConfigError(f"head `{self.name}`: layers={layers}, replay={replay}; give at least 1 of each")
        self.features, self.layers, self.regularisation = features, layers, regularisation
        self.replay, self.bits = replay, bits
        check_map(self.name, "gelu", features, bits)
        self.check_strength("regularisation", regularisation)

    @property
    def folds(self) -> int:
        return 1

    def make_maps(self) -> dict[str, FeatureMap]:
        width, seed = self.width, self.seed * (self.layers + 1)  # no two seeds of a run share a matrix
        made = {"unit.": FeatureMap("normalised", width, 0, seed, self.bits)}
        self._layers = [FeatureMap("gelu", width, self.features, seed + 1 + k, self.bits) for k in range(self.layers)]
        self._last = FeatureMap("gelu", width, self.features, seed, self.bits)
        for k in range(self.layers):
            made[f"z{k}."] = FeatureMap("gelu_normalised", width, self.features, seed + 1 + k, self.bits)
        return made

    @property
    def chosen(self) -> FeatureMap:
        return self._last

    def fit(self) -> tuple[list[int], Tensor, float]:
        """See `MomentsHead.fit`; the strength is lambda."""
        if self._fitted is None:
            seen = self.seen()
            (G,), (Q,), (n,) = self.moments(seen, "unit.")
            means = (Q / n).T  # mu, (k x L)
            S = (G - Q @ means) / float(n.sum()) + JITTER * torch.eye(self.width, dtype=G.dtype)
            T = spread(means, S)
            self._thetas = []
            for k in range(self.layers):
                (A,), (B,), _ = self.moments(seen, f"z{k}.")
                self._thetas.append(solve(A, B @ T, self.regularisation))  # (M x L)
            g = torch.Generator().manual_seed(self.seed)
            noise = torch.randn(len(seen) * self.replay, self.width, generator=g, dtype=torch.float64)
            y = torch.arange(len(seen)).repeat_interleave(self.replay)
            x = means[y] + noise @ torch.linalg.cholesky(S).T
            h = self._last.steps(self._projected([layer.steps(x)[0] for layer in self._layers]))[0] * self.unit
            Y = torch.nn.functional.one_hot(y, len(seen)).to(h.dtype)
            self._fitted = seen, solve(h.T @ h, h.T @ Y, self.regularisation), self.regularisation
        return self._fitted

    def _projected(self, z: list[Tensor]) -> Tensor:
        """p from z_k in steps, (N x L)."""
        total = torch.zeros(len(z[0]), self.width, dtype=torch.float64)
        for steps, layer, theta in zip(z, self._layers, self._thetas, strict=True):
            y, _ = PROJECTED.steps(exact_matmul(steps, self.bits, theta) * layer.unit)
            # integers: the length of a row has the same bits whatever stands in the other rows
            length = y.long().square().sum(1, keepdim=True).to(torch.float64).sqrt()
            total = total + y / length.where(length > 0, torch.ones((), dtype=length.dtype))
        return total / self.layers

    def expand(self, features: Tensor) -> tuple[Tensor, int]:
        """h in steps, (N x M), after `fit`."""
        z = [self.maps[f"z{k}."].steps(features)[0] for k in range(self.layers)]
        return self._last.steps(self._projected(z))


def spread(means: Tensor, S: Tensor) -> Tensor:
    """Targets t_c of length 1, (k x L), from class means (k x L) and their covariance S (L x L), see `AnaCPHead`."""
    d, E = torch.linalg.eigh(S)
    W = (E / d.clamp(min=1e-8).sqrt()) @ E.T
    centre = means.mean(0)
    U, s, Vh = torch.linalg.svd((means - centre) @ W, full_matrices=False)
    pushed = torch.where(s > 1e-9 * s.max(), s + 1, torch.zeros((), dtype=s.dtype))
    return normalize((U * pushed) @ Vh @ W + centre, dim=1)
