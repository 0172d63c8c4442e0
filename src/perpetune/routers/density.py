"""A density of scores for each task: Student's t, with covariances drawn towards what all tasks have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .base import State

PULL = 100.0  # samples' worth of the pooled covariance in that of each task
TAILS = 10.0  # degrees of freedom: scores stray further than a Gaussian's
FLOOR = 1e-6  # least variance of a score; scores of the right task are about 1, of the others about 0
ENTRIES = 2**22  # numbers held at a time while distances are computed
HELD = 256  # precisions of as many tasks are held
CLOSE = 16  # tasks of which an input is held against their own covariance


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


def all_close(tasks: int) -> bool:
    """Whether an input is held against the own covariances of so many tasks, all of them."""
    return tasks <= CLOSE


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
