"""Choose the scale of summed deltas on validation data: the deltas do not depend on it, so nothing is learned again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from .consolidation import SparseSum
from .errors import ConfigError
from .evaluation import Evaluator
from .heads import make_head
from .learned import Learned
from .progress import Progress
from .run import Run, active
from .streams import Stream

SCALES = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0)


def accuracy_by_scale(
    path: str | Path,
    stream: Stream,
    values: Sequence[float] = SCALES,
    *,
    head: str = "ncm",
    model: str | None = None,
    progress: Progress | None = None,
) -> dict[float, float]:
    """Mean accuracy over the tasks of theta_0 + s sum_t m_t * d_t, among all their classes, for several s.

    For every s the head gathers its statistics anew from the training data of all tasks; it is asked about their
    validation data.

    Args:
        path: a run with `SparseSum`, each delta made from the base (`sequential` is False).
        stream: its stream, measured on validation data that the deltas were not made with (`validation_share`).
        values: the scales to try, instead of the consolidation's own.
        head: one that gathers statistics: "ncm" or "ridge".

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
    learned = Learned.open(path, model=model)
    consolidation = learned.recipe.consolidation
    if not isinstance(consolidation, SparseSum) or consolidation.sequential:
        raise ConfigError(
            f"recipe `{learned.recipe.name}` sums no independent deltas: take `sotu` or `task_arithmetic`"
        )
    reader = make_head(head)
    if reader.trains:
        raise ConfigError(f"head `{head}` would have to be trained again for every scale: take ncm or ridge")
    commits = active(Run.read(path).commits)
    backbone, fresh = learned.fresh()
    assert isinstance(fresh, SparseSum)
    found = {}
    progress = progress or Progress()
    with progress, progress.bar("scales", len(values)) as advance:
        for s in values:
            fresh.scale = float(s)
            fresh.restore(commits)
            evaluator = Evaluator(backbone, int(learned.training["per_device_eval_batch_size"]), Progress())
            reader.open(backbone.width, stream.labels, seed=learned.seed)
            for task in stream:
                reader.observe(evaluator.features(task, "train"), torch.tensor(task.train["label"]), task.train["id"])
            seen = sorted({c for task in stream for c in task.classes})
            right = []
            for task in stream:
                choice = reader.scores(evaluator.features(task, "test"))[:, seen].argmax(1).cpu()
                right.append(float((torch.tensor(seen)[choice] == torch.tensor(task.test["label"])).double().mean()))
            found[float(s)] = sum(right) / len(right)
            advance(1)
    return found
