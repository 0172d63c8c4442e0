"""Ridge regression on the task, read as a probability through held-out moments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.errors import ConfigError, nearest
from ..core.measurement import Measurement
from ..heads.moments import MomentsHead
from ..heads.ridge import FEWEST, solve
from .base import RouterError, State
from .density import PULL, Density, all_close, scatter, weight
from .sums import SumsRouter


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

    and S is of all tasks with hold-out samples. Where most tasks are small, there is no posterior; or, `together`,

        p(t | x) = softmax_t (s / tau),

    tau of the least expected log-loss on the hold-outs of all tasks together (`SumsRouter.tempered`).

    Tasks are put in an order of their own, by what is stored of them, before anything is solved: routes have the same
    bits in any order of tasks, of samples, for any batch size, and after a task was forgotten.

    Stored for a task: 8 M^2 bytes (1.2 MB at M = 384).

    Args:
        features: M, random features; 0 for ridge on the features as they are (better on the text tasks we tried).
        reading: "posterior" or "sum".
        holdout: share of the samples that choose lambda and give the moments.
        bits: see `RidgeHead`.
        many_tasks: see above; together: see above, and `SumsRouter`.

    Raises:
        ConfigError: an argument out of range.
    """

    features: int = 0
    reading: Literal["posterior", "sum"] = "posterior"
    holdout: float = 0.2
    bits: int = 17
    many_tasks: bool = field(default=False, metadata={"unwritten": False})
    together: bool = field(default=False, metadata={"unwritten": False})

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
            posterior = self.reading == "posterior" and self.enough
            self._fitted = Fit(order, head, self._density(head, order) if posterior else None)
        return self._fitted

    def tempered(self) -> tuple[float, float]:
        return self._tempered(self.fit().head)

    def _density(self, head: MomentsHead, order: Sequence[int]) -> Density:
        """The density of hold-out scores for each task, in this order."""
        T, unit = len(order), head.unit
        G, Q = head.statistics["gram"] * unit**2, head.statistics["cross"].mT * unit  # (2 x M x M), (2 x M x T)
        Theta = solve(G[0], Q[0], head.fit()[2])  # (M x T), train fold
        counts = head.statistics["counts"]
        n = counts[1].to(torch.float64)  # (T,)
        m = (Theta.T @ Q[1] / n.clamp(min=1)).T.contiguous()  # (T x T), row t: m_t
        if all_close(T) and bool(counts.min() >= FEWEST):
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
        if not self.known or self.reading == "sum":
            return False
        return self.fit().density is not None or self.enough_together

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
        if probabilities:
            s = fit.density.log_posterior(s) if fit.density else (s / self.tempered()[0]).log_softmax(1)
        columns[:, fit.order] = s
        return columns

    def plain(self) -> tuple[dict[str, Any], State]:
        """See `Router.plain`: theta, and the density of its scores or their temperature where there is one."""
        fit = self.fit()
        settings, tensors = self._plain(fit.head, fit.order)
        found = {} if fit.density is None else fit.density.plain()
        tau = self.tempered()[0] if self.calibrated and not found else None
        return {**settings, "posterior": bool(found), "tau": tau}, {**tensors, **found}

    def guarantee(self) -> list[Measurement]:
        """Storage, the promises of the sums, and how many held-out samples the posterior rests on."""
        measured = super().guarantee()
        if self.known:
            head = self.fit().head
            measured += [replace(m, source=self._name) for m in head.guarantee()]
            fewest = float(head.statistics["counts"][1].min())
            note = f"Of the task with the fewest; from {FEWEST} on it has moments of its own."
            measured.append(Measurement("held-out samples of a task", fewest, None, "samples", self._name, note))
        return measured


@dataclass(frozen=True)
class Fit:
    """The tasks in the order of the columns, the head that scores them, and the density of its scores if there is."""

    order: list[int]
    head: MomentsHead
    density: Density | None
