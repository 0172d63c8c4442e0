"""Choose the scale of summed deltas on validation data: the deltas do not depend on it, so nothing is learned again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from ..consolidation import DeltaMerge
from ..core.errors import ConfigError
from ..core.progress import Progress
from ..heads import make_head
from ..learning.evaluator import Evaluator
from ..learning.learner import Learner
from ..runs.commit import active
from ..runs.directory import Run
from ..streams import Stream

SCALES = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0)


def usual_head(stream: Stream) -> str:
    """Which head reads a model of every scale, if none is asked for."""
    return "language" if stream.modality == "language" else "ncm"


def accuracy_by_scale(
    path: str | Path,
    stream: Stream,
    values: Sequence[float] = SCALES,
    *,
    head: str | None = None,
    model: str | None = None,
    progress: Progress | None = None,
) -> dict[float, float]:
    """Mean accuracy over the tasks of theta_0 + s sum_t m_t * d_t, among all their classes, for several s.

    For every s the head gathers its statistics anew from the training data of all tasks; it is asked about their
    validation data.

    Args:
        path: a run with `DeltaMerge`, each delta made from the base (`sequential` is False).
        stream: its stream, measured on validation data that the deltas were not made with (`validation_share`).
        values: the scales to try, instead of the consolidation's own.
        head: one that gathers statistics, "ncm" (the default) or "ridge"; of a language model its own, "language",
            reads the likelihoods of all answers.

    Raises:
        ConfigError: the run sums no independent deltas; the stream is measured on test data; a scale or head that
            cannot be.
        RunError: no run is there, or it is damaged.
    """
    if not stream.name.endswith("(validation)"):
        raise ConfigError("a scale must not be chosen on test data: learn the stream with --validation 0.2 first")
    bad = [s for s in values if not math.isfinite(s)]
    if bad or not values:
        raise ConfigError(f"scales are numbers, not {bad or 'none'}")
    learner = Learner.open(path, model=model)
    consolidation = learner.recipe.consolidation
    if not isinstance(consolidation, DeltaMerge) or consolidation.sequential:
        raise ConfigError(
            f"recipe `{learner.recipe.name}` sums no independent deltas: take `sotu` or `task_arithmetic`"
        )
    backbone, fresh = learner.fresh()
    assert isinstance(fresh, DeltaMerge)
    speaks = "answers" in backbone.offers
    reader = make_head(head or usual_head(stream))
    if speaks and reader.name != "language":
        raise ConfigError(f"head `{reader.name}` cannot read a language model here: take language")
    if reader.trains and not speaks:
        raise ConfigError(f"head `{reader.name}` would have to be trained again for every scale: take ncm or ridge")
    lengths = None
    if speaks:
        backbone.open_for([reader], stream.labels)
        lengths = backbone.label_embeddings(stream.labels)
    seen = sorted({c for task in stream for c in task.classes})
    commits = active(Run.read(path).commits)
    found = {}
    progress = progress or Progress()
    with progress, progress.bar("scales", len(values)) as advance:
        for s in values:
            fresh.scale = float(s)
            fresh.restore(commits)
            evaluator = Evaluator(backbone, learner.setup.batch_size, Progress())
            reader.open(backbone.width, stream.labels, seed=learner.setup.seed, label_embeddings=lengths)
            for task in stream if not speaks else ():
                labels, ids = torch.tensor(task.train["label"][:]), task.train["id"][:]
                reader.observe(evaluator.features(task, "train"), labels, ids)
            right = []
            for task in stream:
                choice = reader.scores(evaluator.features(task, "test", seen))[:, seen].argmax(1).cpu()
                right.append(float((torch.tensor(seen)[choice] == torch.tensor(task.test["label"][:])).double().mean()))
            found[float(s)] = sum(right) / len(right)
            advance(1)
    return found
