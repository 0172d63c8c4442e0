"""Ridge regression on the classes of every task, read as a softmax whose temperature comes from held-out moments."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..heads.holdout import FEWEST_DRAWS
from ..heads.moments import MomentsHead
from ..heads.ridge import FEWEST, solve
from .base import RouterError, State
from .sums import SumsRouter

SAMPLED = 64  # tasks of which the moments of a softmax's temperature are taken, where there may be many
DRAWS = 4096  # of which the expected log-loss is made; 20 temperatures a decade, 1e-4 to 10
DRAWN = 4096 * 256  # normal numbers at most, where there may be many tasks
TEMPERATURES = torch.logspace(-4, 1, 101, dtype=torch.float64)


@dataclass
class ClassRouter(SumsRouter):
    """p(t, c | x) = softmax_{(t, c)} (s / tau), s = Theta^T h the scores of ridge on (task, class); p(t | x) sums it.

    A task whose classes have little in common is no direction in feature space, but each of its classes may be one:
    this router is for such tasks (alphabets, of characters), `RidgeRouter` for tasks that have a look of their own.

    tau minimises the expected log-loss of K independent normal scores, N(m_1, v_1) of the right class and N(m_0, v_0)
    of the others, with the moments of hold-out samples under Theta_tr, the fit on the train fold alone. With q_tc, G_t
    the hold-out sums of `RidgeHead` for a class and a task, n_t samples in C_t classes, theta_tc a column of Theta_tr:

        m_1 = sum_tc theta_tc . q_tc / n,                     m_0: the same over pairs of sample and other class,
        e_0 = mean of theta_uc^T G_t theta_uc / n_t, u != t,  v_0 = e_0 - m_0^2,
        e_1 = (sum_tc theta_tc^T G_t theta_tc - sum_t n_t (C_t - 1) e_0) / n,  v_1 = e_1 - m_1^2, at least v_0

    (scores of a sample's own task other than the right one are taken to be like those of other tasks). Expectations are
    means over seeded draws. Everything is order-free to the bit, as in `RidgeRouter`; with fewer than 10 samples of a
    task in either fold, or one task alone, there is no posterior, and the route is that of the best score.

    With `many_tasks` it is half of the tasks that need 10 samples in either fold, and of more than 64 tasks e_0 and e_1
    are taken over the first 64 in the order of their own, and of more than 256 columns there are fewer draws: a fit
    then costs no more with a thousand tasks, but for the K columns of Theta.

    With `together` ten samples of all tasks in either fold are enough. Where tasks have too few of their own, tau has
    the least expected log-loss of the *task* on the hold-outs of all of them (`SumsRouter.tempered`): independent
    scores, of which none is near the right one, would be too sure of many classes.

    Stored for a task: 8 M^2 bytes (8 MB at M = 1,024).

    Args:
        features: M, random features; 0 for ridge on the features as they are.
        holdout, bits: see `RidgeHead`.
        many_tasks, together: see above.

    Raises:
        ConfigError: an argument out of range.
    """

    features: int = 1024
    holdout: float = 0.2
    bits: int = 17
    many_tasks: bool = field(default=False, metadata={"unwritten": False})
    together: bool = field(default=False, metadata={"unwritten": False})

    def kinds(self, labels: Sequence[str]) -> Sequence[str]:
        return labels

    def summarise(self, features: Tensor, labels: Tensor, ids: Sequence[str]) -> State:
        return self._sums(features, labels, ids)

    def fit(self) -> tuple[MomentsHead, Tensor, Tensor, float | None]:
        """The head over all (task, class), for each of its K columns the task (K,) and the class (K,), and tau."""
        self.check_observed()
        if self._fitted is None:
            order = self._order()
            names = {task: json.loads(bytes(self.known[task]["labels"].tolist())) for task in order}
            pairs = [(i, task, name) for i, task in enumerate(order) for name in sorted(names[task])]
            head = self._fit_head(
                [f"{i:09d}/{name}" for i, _, name in pairs], [self._by_name(task, names[task]) for task in order]
            )
            task_of = torch.tensor([task for _, task, _ in pairs])
            class_of = torch.tensor([self.labels.index(name) for _, _, name in pairs])
            tau = None
            if self.calibrated:
                alone = self.enough
                tau = self._temperature(head, order, task_of) if alone else self._tempered(head, task_of)[0]
            self._fitted = head, task_of, class_of, tau
        return self._fitted

    def _by_name(self, task: int, names: Sequence[str]) -> State:
        """The state of a task with its classes sorted by name."""
        state, places = self.known[task], torch.tensor(sorted(range(len(names)), key=names.__getitem__))
        axes = {key: axis for key, axis in self._one.class_axis.items() if key in state}
        return {key: state[key].index_select(axis, places) for key, axis in axes.items()}

    def _temperature(self, head: MomentsHead, order: Sequence[int], task_of: Tensor) -> float:
        G_tr, Q = head.statistics["gram"][0] * head.unit**2, head.statistics["cross"].mT * head.unit
        Theta = solve(G_tr, Q[0], head.fit()[2])  # (M x K)
        K, n = len(task_of), float(head.statistics["counts"][1].sum())
        m_1 = float((Theta * Q[1]).sum()) / n
        m_0 = (float((Q[1].sum(1) @ Theta).sum()) / n - m_1) / (K - 1)
        observed = [task for task in order if self.known[task]["counts"][1].any()]
        chosen = observed[:SAMPLED] if self.many_tasks else observed
        inside = alike = pairs = n_c = 0.0  # sums of squared scores, and over how many pairs of sample and class
        G = torch.zeros_like(G_tr) if len(chosen) < len(observed) else head.statistics["gram"][1] * head.unit**2
        for task in chosen:
            G_t, n_t = self._squares(task, 1) * head.unit**2, float(self.known[task]["counts"][1].sum())
            own = task_of == task  # (K,)
            inside += float((Theta[:, own] * (G_t @ Theta[:, own])).sum())
            alike, pairs, n_c = alike + n_t * (int(own.sum()) - 1), pairs + n_t * int((~own).sum()), n_c + n_t
            if len(chosen) < len(observed):
                G += G_t
        outside = float((Theta * (G @ Theta)).sum()) - inside
        e_0 = outside / pairs
        e_1 = (inside - alike * e_0) / n_c
        v_0 = max(e_0 - m_0**2, 1e-12)
        v_1 = max(e_1 - m_1**2, v_0)
        rows = min(DRAWS, max(FEWEST_DRAWS, DRAWN // K)) if self.many_tasks else DRAWS
        draws = torch.randn(rows, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        s = m_0 + v_0**0.5 * draws
        s[:, 0] = m_1 + v_1**0.5 * draws[:, 0]
        losses = torch.stack([(s / tau).logsumexp(1).mean() - s[:, 0].mean() / tau for tau in TEMPERATURES])
        return float(TEMPERATURES[losses.argmin()])

    @property
    def calibrated(self) -> bool:
        return len(self.known) > 1 and (self.enough or self.enough_together)

    def tempered(self) -> tuple[float, float]:
        head, task_of, _, _ = self.fit()
        return self._tempered(head, task_of)

    def _scores(self, features: Tensor) -> Tensor:
        return self.fit()[0].scores(self.checked_queries(features))  # (N x K)

    def route(self, features: Tensor) -> Tensor:
        if self.calibrated:
            return self.log_posterior(features).argmax(1)
        return self.fit()[1][self._scores(features).argmax(1)].to(features.device)

    def log_posterior(self, features: Tensor) -> Tensor:
        log_p, task_of, _ = self.log_joint(features)
        return over_classes(log_p, task_of).to(features.device)

    def plain(self) -> tuple[dict[str, Any], State] | None:
        """See `Router.plain`: theta over (task, class), the class of each column, and tau where there is one."""
        head, task_of, class_of, tau = self.fit()
        settings, tensors = self._plain(head, task_of.tolist())
        return {**settings, "tau": tau}, {**tensors, "class_of": class_of}

    def log_joint(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log p(t, c | x) of every pair of a task and a class, (N x K), and the task and the class of each, (K,).

        Raises:
            RouterError: see `log_posterior`.
        """
        _, task_of, class_of, tau = self.fit()
        if tau is None:
            raise RouterError(
                f"{self._name} needs two tasks, and {FEWEST} samples of each in either fold, for probabilities: "
                "observe more, or call `route`"
            )
        return (self._scores(features) / tau).log_softmax(1), task_of, class_of

    def log_within(self, features: Tensor, task: int) -> Tensor | None:
        _, task_of, class_of, tau = self.fit()
        if tau is None or task not in self.known:
            return None
        own = task_of == task
        log_p = torch.full((len(features), len(self.labels)), -torch.inf, dtype=torch.float64)
        log_p[:, class_of[own]] = (self._scores(features)[:, own] / tau).log_softmax(1)
        return log_p

    def log_classes(self, features: Tensor) -> Tensor | None:
        if not self.calibrated:
            return None
        log_p, _, class_of = self.log_joint(features)
        summed = torch.full((len(features), len(self.labels)), -torch.inf, dtype=torch.float64)
        for c in class_of.unique():
            summed[:, c] = log_p[:, class_of == c].logsumexp(1)
        return summed


def over_classes(log_joint: Tensor, task_of: Tensor) -> Tensor:
    """log p(t | x) of every task up to the last (N x T), -inf where there is none of that number, from `log_joint`."""
    log_t = log_joint.new_full((len(log_joint), int(task_of.max()) + 1), -torch.inf)
    for task in task_of.unique().tolist():
        log_t[:, task] = log_joint[:, task_of == task].logsumexp(1)
    return log_t
