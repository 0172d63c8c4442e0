"""Discriminant analysis and ridge regression of the same sums as one read-out: their errors are not the same."""

from __future__ import annotations

from torch import Tensor

from .closed_form import PENALTIES, readouts
from .holdout import Linear
from .lda import EQUAL, LDAHead
from .ridge import FEWEST

SCALE = 2.0**8  # of the scores of ridge, about 0 or 1, whose temperature then lies within the grid


class LDARidgeHead(LDAHead):
    """The geometric mean of what `LDAHead` and ridge regression say of a sample, from the sums that both read:

        p(c | x) ~ exp(s_c / tau_L + r_c / tau_R)^(1/2),   s of `LDAHead`,   r = h^T (G + lambda I)^-1 Q.

    The logarithm is linear in h: a prediction costs what one of the two does. lambda, in units of the mean of diag G,
    has the highest expected accuracy on the hold-out fold under the fit on the train fold, as the shrinkage has; of
    equals it is the largest. The temperatures have the least expected log-loss there (`HoldoutMoments`). Everything is
    made of sums: the same bits in any order. With fewer than 10 samples in either fold it is `LDAHead`.

    Why both: discriminant analysis is better where tasks look different, ridge where many classes lie close to each
    other, and their mean is as good as the better one on both (docs/results/default.md).
    """

    name = "lda_ridge"
    _with_ridge: tuple[float, float, float] | None = None  # lambda, tau_L, tau_R

    def choose(self, G: Tensor, Q: Tensor, n: Tensor) -> float:
        """The shrinkage; the rest is kept for `linear`."""
        a, self._with_ridge = super().choose(G, Q, n), None
        if int(n.sum(1).min()) >= FEWEST:
            train, holdout = (G[0], Q[0], n[0]), self.holdout_moments(self.seen())
            penalties = PENALTIES[::-1]
            found = holdout.accuracies(readouts("ridge", *train, penalties))
            penalty = max(p for p, accuracy in zip(penalties, found, strict=True) if accuracy >= max(found) - EQUAL)
            tau_L = holdout.temperature(super().linear(*train, a))
            self._with_ridge = penalty, tau_L, holdout.temperature((_ridge(*train, penalty), None))
        return a

    def linear(self, G: Tensor, Q: Tensor, n: Tensor, shrinkage: float) -> Linear:
        Theta, offset = super().linear(G, Q, n, shrinkage)
        if self._with_ridge is None or offset is None:
            return Theta, offset
        penalty, tau_L, tau_R = self._with_ridge
        return Theta / (2 * tau_L) + _ridge(G, Q, n, penalty) / (2 * tau_R), offset / (2 * tau_L)


def _ridge(G: Tensor, Q: Tensor, n: Tensor, penalty: float) -> Tensor:
    (linear,) = readouts("ridge", G, Q, n, [penalty])
    return linear[0] * SCALE
