"""Boundaries that were found in a stream against those that are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def boundary_figures(
    found: Sequence[Mapping[str, int]], truth: np.ndarray, within: int
) -> dict[str, float | int | None]:
    """How well the segments found fit the true tasks.

    A boundary matches one of the other kind within `within` examples, the nearest pairs first, each once.

    Args:
        found: segments in order, each with start, stop, task and detected_at; together they hold all N examples.
        truth: (N,) the true task of every example.
        within: how far from its true place a boundary may be found, in examples.

    Returns:
        precision: matched / found; recall: matched / true;
        delay: mean over matched boundaries of [examples read when it was noticed - true place];
        misplaced: mean over matched boundaries of |place found - true place|;
        purity: 1 / N sum over discovered tasks k of max over true tasks j of |k and j|, 1 where no task mixes several;
        tasks_found, tasks_true, boundaries_found, boundaries_true. None where there is nothing to divide by.
    """
    true = [int(i) for i in np.flatnonzero(np.diff(truth)) + 1]
    own = [(part["start"], part["detected_at"]) for part in found[1:]]
    near = sorted((abs(s - t), s, t, when) for s, when in own for t in true if abs(s - t) <= within)
    matched: dict[int, tuple[int, int]] = {}  # place found -> (true place, when it was noticed)
    for _, s, t, when in near:
        if s not in matched and t not in {place for place, _ in matched.values()}:
            matched[s] = t, when
    given = np.concatenate([np.full(part["stop"] - part["start"], part["task"]) for part in found])
    tasks = np.unique(given)
    purest = sum(int(np.unique(truth[given == k], return_counts=True)[1].max()) for k in tasks)
    delays = [when - t for t, when in matched.values()]
    return {
        "precision": len(matched) / len(own) if own else None,
        "recall": len(matched) / len(true) if true else None,
        "delay": float(np.mean(delays)) if delays else None,
        "misplaced": float(np.mean([abs(s - t) for s, (t, _) in matched.items()])) if matched else None,
        "purity": purest / len(truth),
        "tasks_found": len(tasks),
        "tasks_true": len(np.unique(truth)),
        "boundaries_found": len(own),
        "boundaries_true": len(true),
    }
