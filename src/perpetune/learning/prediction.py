"""Predictions for new inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
from torch import Tensor

from ..consolidation.states import PerTaskStates, Reading, only
from ..core.errors import ConfigError, nearest
from ..heads import Head
from ..models.backbone import Examples
from ..streams.predict_inputs import table
from .evaluator import answers_by_state, best_class, read_by_state
from .setup import Setup
from .state import LearnerState


def predict(
    state: LearnerState,
    inputs: Sequence[Any],
    head: str | None = None,
    classes: Sequence[str] | None = None,
    task: str | None = None,
) -> list[str]:
    """See `Learner.predict`."""
    labels, seen, columns, learned = state.known
    if not learned:
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
    if not seen:  # all that was learned are free texts
        rows = datasets.Dataset.from_dict({**given, "response": [""] * size, "label": [-1] * size, "id": [""] * size})
        return answers(state, state.backbone.prepare(rows), task, state.setup.batch_size)
    state.evaluator.embed([reader], labels, [allowed])
    rows = datasets.Dataset.from_dict({**given, "label": [0] * size, "id": [""] * size})
    examples = state.backbone.prepare(rows)
    best = best_class(scores(state, reader, examples, task, allowed), allowed).tolist()
    found = [labels[c] if c >= 0 else "" for c in best]
    nameless = [i for i, text in enumerate(found) if not text]
    if nameless and classes is None and getattr(reader, "read", "") == "generate":  # what it answered instead
        said = answers(state, [examples[i] for i in nameless], task, state.setup.batch_size)
        for i, text in zip(nameless, said, strict=True):
            found[i] = text
    return found


def answers(state: LearnerState, examples: Examples, task: str | None, size: int, **how: Any) -> list[str]:
    """Generated answers, each under the state of its task where each task has one.

    Args:
        size: prompts at a time; how: see `LanguageBackbone.answers`.
    """
    states = state.consolidation.states
    if states is None:
        _check_shared(task)
        return state.backbone.answers(examples, size, **how)
    reading = read_by_state(state.backbone, states, examples, state.setup.batch_size)
    weights = _weights(state, states, reading, task)
    return answers_by_state(state.backbone, states, weights, examples, size, **how)


def _check_shared(task: str | None) -> None:
    if task is not None:
        raise ConfigError("the model is the same for all tasks: give `classes` to choose among those of one")


def frozen_features(setup: Setup, rows: datasets.Dataset, modality: Any, labels: Sequence[str]) -> Tensor:
    """What routers and boundaries read of each input under the base model (N x `Backbone.pooled_width`).

    Args:
        rows: with the columns of `Task.train`; labels: their label texts.
    """
    backbone = setup.load_backbone(modality)
    backbone.open_for([], labels)
    examples = backbone.prepare(rows)
    with setup.progress, setup.progress.bar("features of the stream", len(examples)) as advance:
        return backbone.pooled(examples, setup.batch_size, advance)


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
    backbone, states = state.backbone, state.consolidation.states
    if states is None:
        _check_shared(task)
        return head.scores(backbone.outputs(examples, state.setup.batch_size, classes=allowed))
    reading = read_by_state(backbone, states, examples, state.setup.batch_size)
    return states.scores(head, len(state.known.labels), reading, _weights(state, states, reading, task))


def _weights(state: LearnerState, states: PerTaskStates, reading: Reading, task: str | None) -> Tensor:
    """log p(task | x), (N x T); all of the task that is given, if one is."""
    if task is None:
        return states.weights(reading)
    learned = list(state.known.tasks)
    if task not in learned:
        raise ConfigError(f"this run has learned no task `{task}`: {nearest(task, learned)}")
    return only(state.consolidation.reads(learned.index(task), len(learned) - 1), reading.count, len(learned))
