"""Ridge regression on the task, read as a probability through held-out moments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.errors import ConfigError, nearest
from ..core.measurement import Measurement
from ..heads.moments import MomentsHead
from ..heads.ridge import FEWEST, solve
from .base import RouterError, State
from .sums import SumsRouter, holds_for_most

PULL = 100.0  # samples' worth of the pooled covariance in that of each task
TAILS = 10.0  # degrees of freedom: scores stray further than a Gaussian's
FLOOR = 1e-6  # least variance of a score; scores of the right task are about 1, of the others about 0
ENTRIES = 2**22  # numbers held at a time while distances are computed
HELD = 256  # precisions of as many tasks are held
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

    With `many_tasks` such a small task does not keep others from theirs: it is taken to be like all of them. It counts
    10 samples more, whose scores are mu_1 for this task and mu_0 for others, the means over all hold-out samples,

        m_t = (Theta_tr^T q_t + 10 mu_t) / (n_t + 10),   S_t = (1 + 1 / (n_t + 10)) S,

    and S is of all tasks with hold-out samples. Where most tasks are small, there is no posterior.

    Tasks are put in an order of their own, by what is stored of them, before anything is solved: routes have the same
    bits in any order of tasks, of samples, for any batch size, and after a task was forgotten.

    Stored for a task: 8 M^2 bytes (1.2 MB at M = 384).

    Args:
        features: M, random features; 0 for ridge on the features as they are (better on the text tasks we tried).
        reading: "posterior" or "sum".
        holdout: share of the samples that choose lambda and give the moments.
        bits: see `RidgeHead`.
        many_tasks: see above.

    Raises:
        ConfigError: an argument out of range.
    """

    features: int = 0
    reading: Literal["posterior", "sum"] = "posterior"
    holdout: float = 0.2
    bits: int = 17
    many_tasks: bool = field(default=False, metadata={"unwritten": False})

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
            head = self._fit_head([f"{i:09d}" for i in range(len(order))], [self.known[task] for task in order])
            posterior = self.reading == "posterior" and self._enough(head.statistics["counts"])
            self._fitted = Fit(order, head, self._density(head, order) if posterior else None)
        return self._fitted

    def _enough(self, counts: Tensor) -> bool:
        """Whether there are samples enough for a posterior; counts (2 x T)."""
        return holds_for_most(counts.min(0).values >= FEWEST, self.many_tasks)

    def _density(self, head: MomentsHead, order: Sequence[int]) -> Density:
        """The density of hold-out scores for each task, in this order."""
        T, unit = len(order), head.unit
        G, Q = head.statistics["gram"] * unit**2, head.statistics["cross"].mT * unit  # (2 x M x M), (2 x M x T)
        Theta = solve(G[0], Q[0], head.fit()[2])  # (M x T), train fold
        counts = head.statistics["counts"]
        n = counts[1].to(torch.float64)  # (T,)
        m = (Theta.T @ Q[1] / n.clamp(min=1)).T.contiguous()  # (T x T), row t: m_t
        if T <= CLOSE and bool(counts.min() >= FEWEST):
            B = torch.stack(
                [scatter(Theta, self._squares(task, 1) * unit**2, m[t], n[t]) for t, task in enumerate(order)]
            )
            return Density.of(m, B, n)
        S = Theta.T @ G[1] @ Theta - (m.T * n) @ m
        S = (S + S.T) / (2 * (n.sum() - (n > 0).sum()))
        means, samples = m, n
        if bool((small := counts.min(0).values < FEWEST).any()):
            mu_1 = (n * m.diagonal()).sum() / n.sum()
            mu_0 = ((n @ m).sum() / n.sum() - mu_1) / max(1, T - 1)
            mu = mu_0 + (mu_1 - mu_0) * torch.eye(T, dtype=m.dtype)
            means = torch.where(small[:, None], (n[:, None] * m + FEWEST * mu) / (n + FEWEST)[:, None], m)
            samples = torch.where(small, n + FEWEST, n)

        def own(t: int, S: Tensor) -> Tensor:
            B_t = scatter(Theta, self._squares(order[t], 1) * unit**2, m[t], n[t])
            return (B_t + PULL * S) * weight(n[t])

        return Density.many(means, S, samples, own, ~small)

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
        found = {} if fit.density is None else fit.density.plain()
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


class Precisions:
    """P_t = S_t^-1 (T x T) and log |S_t|, computed when they are first asked for: of many tasks, few are ever near."""

    def __init__(self, covariance: Callable[[int], Tensor]) -> None:
        def factors(t: int) -> tuple[Tensor, Tensor]:
            factor = torch.linalg.cholesky(covariance(t))
            return torch.cholesky_inverse(factor), 2 * factor.diagonal().log().sum()

        self.of = lru_cache(maxsize=HELD)(factors)

    def __getitem__(self, t: int) -> Tensor:
        return self.of(t)[0]


@dataclass(frozen=True)
class Density:
    """Student's t for each of T tasks: means m (T x T), precisions P = S_t^-1 (T x T x T), log-determinants of S_t.

    Of what they have in common: W with W^T W = S^-1, W m_t (both T x T), log |S|, and 1 + 1 / n_t (T,). `own` (T,):
    whether a task has a covariance of its own, and not the widened S.
    """

    m: Tensor
    P: Tensor | Precisions
    logdet: Tensor | None
    W: Tensor
    Wm: Tensor
    common: Tensor
    widened: Tensor
    own: Tensor

    @classmethod
    def of(cls, m: Tensor, B: Tensor, n: Tensor) -> Density:
        """See `RidgeRouter`: from means, scatter B_t about them (T x T x T) and numbers of samples n (T,)."""
        S = regularised(B.sum(0) / (float(n.sum()) - len(n)), n)
        factor = torch.linalg.cholesky((B + PULL * S) * weight(n)[:, None, None])
        logdet = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return cls(m, torch.cholesky_inverse(factor), logdet, *shared(S, m), 1 + 1 / n, torch.ones(len(n)).bool())

    @classmethod
    def many(cls, m: Tensor, S: Tensor, n: Tensor, covariance: Callable[[int, Tensor], Tensor], own: Tensor) -> Density:
        """From means, the pooled covariance (T x T), numbers of samples, and S_t by task and S, made when it is needed:
        memory grows like T^2 and not like T^3."""
        S = regularised(S, n)
        return cls(m, Precisions(lambda t: covariance(t, S)), None, *shared(S, m), 1 + 1 / n, own)

    def log_posterior(self, s: Tensor) -> Tensor:
        """log p(t | s), (N x T) -> (N x T); by elements or rows, so that a row does not know the others."""
        T = len(self.m)
        if (T > CLOSE or not bool(self.own.all())) and len(s):
            d2, logdet = (torch.stack(values) for values in zip(*map(self._nearest, s), strict=True))
        else:
            d2 = torch.cat([self._distances(rows) for rows in s.split(max(1, ENTRIES // T**2))])
            logdet = torch.stack([self._logdet(t) for t in range(T)])
        logp = -0.5 * logdet - (TAILS + T) / 2 * torch.log1p(d2 / (TAILS - 2))
        return logp - logp.logsumexp(1, keepdim=True)

    def plain(self) -> State:
        """With a precision and a determinant for every task, those of the widened S where it has none of its own."""
        S_t = [self.P[t] if own else self.W.T @ self.W / self.widened[t] for t, own in enumerate(self.own.tolist())]
        far = self.common + len(self.m) * self.widened.log()
        logdet = [self._logdet(t) if own else far[t] for t, own in enumerate(self.own.tolist())]
        held = {"m": self.m, "W": self.W, "Wm": self.Wm, "common": self.common, "widened": self.widened}
        return {**held, "P": torch.stack(S_t), "logdet": torch.stack(logdet)}

    def _logdet(self, t: int) -> Tensor:
        return self.logdet[t] if self.logdet is not None else self.P.of(t)[1]  # type: ignore[union-attr]

    def _nearest(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """d_t^2 and log |S_t| of one sample, both (T,): S_t of the nearest tasks, (1 + 1 / n_t) S of the others."""
        d2 = (self.W @ s - self.Wm).square().sum(1) / self.widened
        logdet = self.common + len(s) * self.widened.log()
        near = d2.argsort(stable=True)[:CLOSE]
        for t in near[self.own[near]].tolist():
            x = s - self.m[t]
            d2[t], logdet[t] = x @ (self.P[t] @ x), self._logdet(t)
        return d2, logdet

    def _distances(self, s: Tensor) -> Tensor:
        """d_t^2, (N x T)."""
        x = s[:, None] - self.m  # (N x T x T): of each sample, its difference from each mean
        y = torch.zeros_like(x)  # S_t^-1 x; a matrix product would round differently for other N
        P = torch.stack([self.P[t] for t in range(len(self.m))])
        for k in range(len(self.m)):
            y += x[:, :, k, None] * P[:, k]
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


def scatter(Theta: Tensor, G_t: Tensor, m_t: Tensor, n_t: Tensor) -> Tensor:
    """B_t, (T x T)."""
    return Theta.T @ G_t @ Theta - n_t * torch.outer(m_t, m_t)


def weight(n: Tensor) -> Tensor:
    """What makes a covariance of B_t + a S."""
    return (1 + 1 / n) / (n - 1 + PULL)


def regularised(S: Tensor, n: Tensor) -> Tensor:
    """S drawn towards its diagonal by the share T / (T + sum_t n_t), with the least variance added."""
    share = len(n) / (len(n) + float(n.sum()))
    return (1 - share) * S + share * torch.diag(S.diagonal()) + FLOOR * torch.eye(len(n), dtype=S.dtype)


def shared(S: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W, W m_t and log |S|."""
    factor = torch.linalg.cholesky(S)
    W = torch.linalg.solve_triangular(factor, torch.eye(len(S), dtype=S.dtype), upper=False)
    return W, m @ W.T, 2 * factor.diagonal().log().sum()
