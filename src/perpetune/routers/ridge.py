"""Ridge regression on the task, read as a probability through held-out moments."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.errors import ConfigError, nearest
from ..core.measurement import Measurement
from ..heads.moments import MomentsHead
from ..heads.ridge import FEWEST, solve
from .base import RouterError, State
from .sums import SumsRouter

PULL = 100.0  # samples' worth of the pooled covariance in that of each task
TAILS = 10.0  # degrees of freedom: scores stray further than a Gaussian's
FLOOR = 1e-6  # least variance of a score; scores of the right task are about 1, of the others about 0
ENTRIES = 2**22  # numbers held at a time while distances are computed
CLOSE = 16  # tasks of which an input is held against their own covariance


@dataclass
class RidgeRouter(SumsRouter):
    """Scores s = Theta^T h in R^T of ridge regression on the task, from sums; then a density of s for each task.

    G = sum h h^T and Q = sum h y^T, y one-hot over *tasks*, are those of `RidgeHead`, in two folds: exact, order-free
    sums. For the same lambda s_t is the sum of the scores that ridge on (task, class) would give to the classes of t,
    because ridge is linear in y.

    Reading "sum": argmax_t s_t. Reading "posterior" (default): with Theta_tr fitted on the train fold alone, hold-out
    samples are new to it, and the moments of their scores follow from the hold-out sums G_t, q_t, n_t of each task:

        m_t = Theta_tr^T q_t / n_t,   B_t = Theta_tr^T G_t Theta_tr - n_t m_t m_t^T,
        S   = sum_t B_t / (n - T), drawn towards its diagonal by the share T / (T + n), plus 1e-6 I,
        S_t = (B_t + a S) / (n_t - 1 + a) * (1 + 1 / n_t),   a = 100; the last factor: m_t is an estimate,
        p(t | x) ~ |S_t|^-1/2 (1 + d_t^2 / (nu - 2))^-((nu + T) / 2),   d_t^2 = (s - m_t)^T S_t^-1 (s - m_t), nu = 10:

    quadratic discriminant analysis with covariances S_t drawn towards the common one, the tails of Student's t, and all
    tasks equally likely beforehand. With more than 16 tasks S_t is taken of the 16 that are nearest under S, and
    (1 + 1 / n_t) S of the others: an input costs 18 T^2 operations and not T^3. s itself is scored with the final
    Theta, of both folds. Where a task has fewer than 10 samples in either fold, the reading is "sum" and there is no
    posterior. With many tasks that are hard to tell apart and hardly more samples than that, the posterior is too sure
    of itself.

    Tasks are put in an order of their own, by what is stored of them, before anything is solved: routes have the same
    bits in any order of tasks, of samples, for any batch size, and after a task was forgotten.

    Stored for a task: 8 M^2 bytes (1.2 MB at M = 384).

    Args:
        features: M, random features; 0 for ridge on the features as they are (better on the text tasks we tried).
        reading: "posterior" or "sum".
        holdout: share of the samples that choose lambda and give the moments.
        bits: see `RidgeHead`.

    Raises:
        ConfigError: an argument out of range.
    """

    features: int = 0
    reading: Literal["posterior", "sum"] = "posterior"
    holdout: float = 0.2
    bits: int = 17

    def __post_init__(self) -> None:
        if self.reading not in ("posterior", "sum"):
            raise ConfigError(f"RidgeRouter: reading={self.reading!r}; {nearest(self.reading, ('posterior', 'sum'))}")
        super().__post_init__()

    def kinds(self, labels: Sequence[str]) -> Sequence[str]:
        return ["task"]

    def summarise(self, features: Tensor, labels: Tensor, ids: Sequence[str]) -> State:
        return self._sums(features, torch.zeros(len(ids), dtype=torch.long), ids)

    def fit(self) -> Fit:
        """All that predictions need, computed once after each change.

        Raises:
            PerpetuneError: no task was observed, or more samples than exact sums allow.
        """
        self.check_observed()
        if self._fitted is None:
            order = self._order()
            names = [f"{i:09d}" for i in range(len(order))]
            head = self._opened(names)
            for name, task in zip(names, order, strict=True):
                head.add({**self.known[task], "labels": _label(name)})
            enough = bool(head.statistics["counts"].min() >= FEWEST)
            density = self._density(head, order) if enough and self.reading == "posterior" else None
            self._fitted = Fit(order, head, density)
        return self._fitted

    def _density(self, head: MomentsHead, order: Sequence[int]) -> Density:
        """The density of hold-out scores for each task, in this order."""
        T, unit = len(order), head.unit
        G_tr, Q = head.statistics["gram"][0] * unit**2, head.statistics["cross"].mT * unit  # (M x M), (2 x M x T)
        Theta = solve(G_tr, Q[0], head.fit()[2])  # (M x T), train fold
        n = head.statistics["counts"][1].to(torch.float64)  # (T,)
        m = (Theta.T @ Q[1] / n).T.contiguous()  # (T x T), row t: m_t
        B = torch.empty(T, T, T, dtype=torch.float64)
        for t, task in enumerate(order):
            self._one.load_state(self.known[task])
            B[t] = Theta.T @ (self._one.statistics["gram"][1] * unit**2) @ Theta - n[t] * torch.outer(m[t], m[t])
        return Density.of(m, B, n)

    @property
    def calibrated(self) -> bool:
        return bool(self.known) and self.fit().density is not None

    def route(self, features: Tensor) -> Tensor:
        return self._columns(features, probabilities=self.calibrated).argmax(1).to(features.device)  # the first

    def log_posterior(self, features: Tensor) -> Tensor:
        self.check_observed()
        if not self.calibrated:
            fewest = f'needs {FEWEST} samples of every task in either fold and reading="posterior"'
            raise RouterError(f"RidgeRouter {fewest} for probabilities: observe more samples, or call `route`")
        return self._columns(features, probabilities=True).to(features.device)

    def _columns(self, features: Tensor, probabilities: bool) -> Tensor:
        """Scores or log-probabilities with one column for each task index, (N x highest task + 1)."""
        fit = self.fit()
        s = fit.head.scores(self.checked_queries(features))  # (N x T)
        columns = torch.full((len(s), max(fit.order) + 1), -torch.inf, dtype=torch.float64)
        columns[:, fit.order] = fit.density.log_posterior(s) if probabilities and fit.density else s
        return columns

    def plain(self) -> tuple[dict[str, Any], State]:
        """See `Router.plain`: theta, and the density of its scores where there is one."""
        fit = self.fit()
        settings, tensors = self._plain(fit.head, fit.order)
        found = {} if fit.density is None else {f.name: getattr(fit.density, f.name) for f in fields(Density)}
        return {**settings, "posterior": bool(found)}, {**tensors, **found}

    def guarantee(self) -> list[Measurement]:
        """Storage, the promises of the sums, and how many held-out samples the posterior rests on."""
        measured = super().guarantee()
        if self.known:
            head = self.fit().head
            measured += [replace(m, source=self._name) for m in head.guarantee()]
            fewest = float(head.statistics["counts"][1].min())
            note = f"Of the task with the fewest; below {FEWEST} the router gives a route without a probability."
            measured.append(Measurement("held-out samples of a task", fewest, None, "samples", self._name, note))
        return measured


@dataclass(frozen=True)
class Density:
    """Student's t for each of T tasks: means m (T x T), precisions P = S_t^-1 (T x T x T), log-determinants of S_t.

    Of what they have in common: W with W^T W = S^-1, W m_t (both T x T), log |S|, and 1 + 1 / n_t (T,).
    """

    m: Tensor
    P: Tensor
    logdet: Tensor
    W: Tensor
    Wm: Tensor
    common: Tensor
    widened: Tensor

    @classmethod
    def of(cls, m: Tensor, B: Tensor, n: Tensor) -> Density:
        """See `RidgeRouter`: from means, scatter B_t about them (T x T x T) and numbers of samples n (T,)."""
        T, total = len(n), float(n.sum())
        S = B.sum(0) / (total - T)
        share = T / (T + total)
        S = (1 - share) * S + share * torch.diag(S.diagonal()) + FLOOR * torch.eye(T, dtype=S.dtype)
        weight = ((1 + 1 / n) / (n - 1 + PULL))[:, None, None]
        factor, common = torch.linalg.cholesky((B + PULL * S) * weight), torch.linalg.cholesky(S)
        logdet, of_S = (2 * x.diagonal(dim1=-2, dim2=-1).log().sum(-1) for x in (factor, common))
        W = torch.linalg.solve_triangular(common, torch.eye(T, dtype=S.dtype), upper=False)
        return cls(m, torch.cholesky_inverse(factor), logdet, W, m @ W.T, of_S, 1 + 1 / n)

    def log_posterior(self, s: Tensor) -> Tensor:
        """log p(t | s), (N x T) -> (N x T); by elements or rows, so that a row does not know the others."""
        T = len(self.m)
        if T > CLOSE and len(s):
            d2, logdet = (torch.stack(values) for values in zip(*map(self._nearest, s), strict=True))
        else:
            d2 = torch.cat([self._distances(rows) for rows in s.split(max(1, ENTRIES // T**2))])
            logdet = self.logdet
        logp = -0.5 * logdet - (TAILS + T) / 2 * torch.log1p(d2 / (TAILS - 2))
        return logp - logp.logsumexp(1, keepdim=True)

    def _nearest(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """d_t^2 and log |S_t| of one sample, both (T,): S_t of the nearest tasks, (1 + 1 / n_t) S of the others."""
        d2 = (self.W @ s - self.Wm).square().sum(1) / self.widened
        logdet = self.common + len(s) * self.widened.log()
        near = d2.argsort(stable=True)[:CLOSE]
        x = s - self.m[near]  # K x T
        d2[near] = torch.stack([x[k] @ (self.P[t] @ x[k]) for k, t in enumerate(near.tolist())])
        logdet[near] = self.logdet[near]
        return d2, logdet

    def _distances(self, s: Tensor) -> Tensor:
        """d_t^2, (N x T)."""
        x = s[:, None] - self.m  # (N x T x T): of each sample, its difference from each mean
        y = torch.zeros_like(x)  # S_t^-1 x; a matrix product would round differently for other N
        for k in range(len(self.m)):
            y += x[:, :, k, None] * self.P[:, k]
        d2 = torch.zeros(x.shape[:2], dtype=x.dtype)
        for k in range(len(self.m)):
            d2 += x[:, :, k] * y[:, :, k]
        return d2


@dataclass(frozen=True)
class Fit:
    """The tasks in the order of the columns, the head that scores them, and the density of its scores if there is."""

    order: list[int]
    head: MomentsHead
    density: Density | None


def _label(name: str) -> Tensor:
    """Label texts of a head with one class, as heads save them (`OpenedHead.header`)."""
    return torch.tensor(list(json.dumps([name]).encode()), dtype=torch.uint8)
