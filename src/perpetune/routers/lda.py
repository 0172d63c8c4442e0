"""Discriminant analysis on the classes of every task, with a temperature from held-out moments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..heads.exact_sums import exact_matmul
from ..heads.feature_maps import Kind
from ..heads.holdout import Linear
from ..heads.lda import LDAHead
from ..heads.lda_ridge import LDARidgeHead
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
        ridge: scores are those of `LDARidgeHead`, of the same sums.

    Raises:
        ConfigError: an argument out of range.
    """

    map: Kind = "normalised"
    gamma: float = field(default=1.0, metadata={"unwritten": 1.0})
    ridge: bool = field(default=False, metadata={"unwritten": False})

    def _head(self) -> LDAHead:
        kind = LDARidgeHead if self.ridge else LDAHead
        return kind(self.map, self.features, holdout=self.holdout, bits=self.bits, gamma=self.gamma)

    def plain(self) -> None:
        """See `Router.plain`: maps of features and offsets are not among what is described there."""
        return None

    def _temperature(self, head: MomentsHead, order: Sequence[int], task_of: Tensor) -> float:
        return _tempered(head, range(len(head.labels)))[2]

    def _train_fold(self, head: MomentsHead) -> tuple[Linear, float]:
        return _of_train_fold(head, range(len(head.labels))), 1.0

    def alone(self, features: Tensor, task: int) -> Tensor:
        """log p(c | x, t) of the train fold of this task alone, (N x C), -inf for all other classes: for samples of its
        hold-out fold, which this prediction has not seen. Other tasks do not change a bit of it."""
        head = self._one
        head.load_state(self.known[self._observed(task)])
        seen = head.seen()
        Theta, offset, tau = _tempered(head, seen)
        h, _ = head.expand(self.checked_queries(features))
        log_p = torch.full((len(features), len(self.labels)), -torch.inf, dtype=torch.float64)
        log_p[:, seen] = ((exact_matmul(h, head.bits, Theta) * head.unit + offset) / tau).log_softmax(1)
        return log_p


def _tempered(head: MomentsHead, classes: Sequence[int]) -> tuple[Tensor, Tensor, float]:
    """Theta (M x k) and offsets (k,) of the train fold, and the temperature with the least expected log-loss on the
    hold-out."""
    Theta, offset = _of_train_fold(head, classes)
    assert offset is not None
    return Theta, offset, head.holdout_moments(classes).temperature((Theta, offset))


def _of_train_fold(head: MomentsHead, classes: Sequence[int]) -> Linear:
    assert isinstance(head, LDAHead)
    a, (G, Q, n) = head.fit()[2], head.moments(classes)
    return head.linear(G[0], Q[0], n[0], a)
