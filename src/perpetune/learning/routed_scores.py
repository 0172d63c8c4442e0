"""Scores of a head where the model has a state for every task, and inputs are divided among them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..consolidation import Consolidation
from ..heads import Head


def routed_scores(
    head: Head,
    classes: int,
    weights: Tensor,
    consolidation: Consolidation,
    features: Callable[[int | None, Tensor], Tensor],
) -> Tensor:
    """log p(c | x) = log sum_t p(t | x) p(c | x, t), (N x C), fp64: over the tasks that each input is shown to.

    One task after the other, all its inputs at once: one pass of the model for every task that is present.

    Args:
        classes: C.
        weights: log p(t | x), (N x T), -inf where an input is not shown to a task.
        features: `features(t, rows)` gives those of some inputs (rows: indices) under the adapter of task t; with None,
            those that the router reads.
    """
    scores = torch.full((len(weights), classes), -torch.inf, dtype=torch.float64)
    shown = weights > -torch.inf
    for t in shown.any(0).nonzero().flatten().tolist():
        rows = shown[:, t].nonzero().flatten()
        own = torch.tensor(consolidation.task_classes(t))
        log_p = _log_softmax(head.scores(features(t, rows), t)[:, own].double().cpu())  # p(c | x, t)
        prior = consolidation.prior_of(partial(features, None, rows), t)
        if prior is not None:
            log_p = _log_softmax(log_p + prior[:, own].cpu())
        where = rows[:, None], own[None]
        scores[where] = torch.logaddexp(scores[where], weights[rows, t].double()[:, None] + log_p)
    return scores


def _log_softmax(scores: Tensor) -> Tensor:
    """Over classes, (n x c); -inf stays where no class has a score: a generated answer may name none of them."""
    return scores.log_softmax(1).masked_fill(scores == -torch.inf, -torch.inf)
