"""Discriminant analysis on the classes of every task, with a temperature from held-out moments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..heads.feature_maps import Kind
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
        map: what the features are mapped to, see `FeatureMap`.

    Raises:
        ConfigError: an argument out of range.
    """

    map: Kind = "normalised"

    def _head(self) -> MomentsHead:
        return LDAHead(self.map, self.features, holdout=self.holdout, bits=self.bits)

    def plain(self) -> None:
        """See `Router.plain`: maps of features and offsets are not among what is described there."""
        return None

    def _temperature(self, head: MomentsHead, order: Sequence[int], task_of: Tensor) -> float:
        columns = range(len(head.labels))
        G, Q, n = head.moments(columns)
        train = Discriminant(G[0], Q[0], n[0]).solve(head.fit()[2])
        return head.holdout_moments(columns).temperature(train)
