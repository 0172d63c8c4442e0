"""Predictions for new inputs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import datasets
import torch
from torch import Tensor

from ..core.errors import ConfigError, nearest
from ..heads import Head
from ..models.backbone import Examples
from ..streams.predict_inputs import table
from .evaluator import best_class
from .routed_scores import routed_scores
from .state import LearnerState


def predict(
    state: LearnerState,
    inputs: Sequence[Any],
    head: str | None = None,
    classes: Sequence[str] | None = None,
    task: str | None = None,
) -> list[str]:
    """See `Learner.predict`."""
    labels, seen, columns, _ = state.known
    if not seen:
        raise ConfigError("no task is learned yet: call learn(stream) first")
    by_name = {h.name: h for h in state.heads}
    if head is not None and head not in by_name:
        raise ConfigError(f"this run reads no head `{head}`: {nearest(head, by_name)}")
    reader = by_name[head or state.heads[0].name]
    allowed = list(seen) if classes is None else _chosen(classes, {labels[c]: c for c in seen})
    given = table(inputs, tuple(columns))
    size = len(inputs)
    if not size:
        return []
    state.evaluator.embed([reader], labels, [allowed])
    rows = datasets.Dataset.from_dict({**given, "label": [0] * size, "id": [""] * size})
    found = scores(state, reader, state.backbone.prepare(rows), task, allowed)
    return [labels[c] if c >= 0 else "" for c in best_class(found, allowed).tolist()]


def _chosen(classes: Sequence[str], known: dict[str, int]) -> list[int]:
    for name in classes:
        if name not in known:
            raise ConfigError(f"class `{name}` is not learned: {nearest(name, known)}")
    if not classes:
        raise ConfigError("classes=[] leaves nothing to choose: None chooses among all classes learned")
    return [known[name] for name in classes]


def scores(state: LearnerState, head: Head, examples: Examples, task: str | None, allowed: Sequence[int]) -> Tensor:
    """(N x C). Where inputs are divided among adapters: one pass to route them, then one for every task that is
    present.

    Args:
        task: whose state predicts, where each task has its own; None routes each input.
        allowed: the classes to choose among.
    """
    backbone, consolidation, size = state.backbone, state.consolidation, state.setup.batch_size
    if not consolidation.routed:
        if task is not None:
            raise ConfigError("the model is the same for all tasks: give `classes` to choose among those of one")
        return head.scores(backbone.about(allowed)(examples, size))

    @functools.cache
    def routing() -> Tensor:
        with consolidation.view(None):
            return backbone.pooled(examples, size)

    def features(view: int | None, rows: Tensor) -> Tensor:
        if view is None:
            return routing()[rows]
        with consolidation.view(view):
            return backbone.about(consolidation.task_classes(view))([examples[i] for i in rows.tolist()], size)

    if task is None:
        weights = consolidation.candidates_of(routing())
    else:
        learned = list(state.known.tasks)
        if task not in learned:
            raise ConfigError(f"this run has learned no task `{task}`: {nearest(task, learned)}")
        weights = torch.full((len(examples), len(learned)), -torch.inf)
        weights[:, consolidation.reads(learned.index(task), len(learned) - 1)] = 0
    return routed_scores(head, len(state.known.labels), weights, consolidation, features)
