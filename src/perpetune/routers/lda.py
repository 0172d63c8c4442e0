"""Discriminant analysis on the classes of every task, with a temperature from held-out moments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..heads.exact_sums import exact_matmul
from ..heads.feature_maps import Kind
from ..heads.holdout import TEMPERATURES
from ..heads.lda import Discriminant, LDAHead
from ..heads.moments import MomentsHead
from .classes import ClassRouter


@dataclass
class LDARouter(ClassRouter):
    """p(t, c | x) = softmax_{(t, c)} (s / tau), s the scores of `LDAHead` on (task, class); p(t | x) sums it.

    Under Gaussians of one covariance tau = 1 would be the posterior itself; tau has the least expected log-loss on the
    hold-out fold under the fit on the train fold, from moments alone (`HoldoutMoments`). All else is as in
    `ClassRouter`, order-free to the bit.

    Stored for a task: 8 M^2 bytes, and 144 M for each of its classes (1.2 MB and 55 kB at M = L = 384).

    Args:
        features: M, where the map is random.
        holdout, bits: see `RidgeHead`.
        map: what the features are mapped to, see `FeatureMap`; gamma: of its kernel, where it is one.

    Raises:
        ConfigError: an argument out of range.
    """

    map: Kind = "normalised"
    gamma: float = field(default=1.0, metadata={"unwritten": 1.0})
    _loss: float = field(default=math.inf, init=False, repr=False, compare=False)

    def _head(self) -> MomentsHead:
        return LDAHead(self.map, self.features, holdout=self.holdout, bits=self.bits, gamma=self.gamma)

    def plain(self) -> None:
        """See `Router.plain`: maps of features and offsets are not among what is described there."""
        return None

    def _temperature(self, head: MomentsHead, order: Sequence[int], task_of: Tensor) -> float:
        tau, self._loss = _tempered(head, range(len(head.labels)))[2:]
        return tau

    def expected_loss(self) -> float:
        """Of held-out samples under the fit on the train fold at tau, in nats, of Gaussian classes; infinite where
        there is no tau."""
        return math.inf if self.fit()[-1] is None else self._loss

    def alone(self, features: Tensor, task: int) -> tuple[Tensor, float]:
        """log p(c | x, t) of the train fold of this task alone, (N x C), and its `expected_loss`: for samples of its
        hold-out fold, which this prediction has not seen. Other tasks do not change a bit of it."""
        head = self._one
        head.load_state(self.known[self._observed(task)])
        seen = head.seen()
        Theta, offset, tau, loss = _tempered(head, seen)
        h, _ = head.expand(self.checked_queries(features))
        log_p = torch.full((len(features), len(self.labels)), -torch.inf, dtype=torch.float64)
        log_p[:, seen] = ((exact_matmul(h, head.bits, Theta) * head.unit + offset) / tau).log_softmax(1)
        return log_p, loss


def _tempered(head: MomentsHead, classes: Sequence[int]) -> tuple[Tensor, Tensor, float, float]:
    """Theta (M x k) and offsets (k,) of the train fold, and the temperature with the least expected log-loss on the
    hold-out, with that loss."""
    G, Q, n = head.moments(classes)
    Theta, offset = Discriminant(G[0], Q[0], n[0]).solve(head.fit()[2])
    losses = head.holdout_moments(classes).log_losses((Theta, offset))
    return Theta, offset, float(TEMPERATURES[losses.argmin()]), float(losses.min())
