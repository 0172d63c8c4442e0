"""Learning from examples in order, without being told where a task ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np

from ..metrics.boundaries import boundary_figures
from ..routers import Detector, Segment
from ..streams import Drift, Stream, Task
from .prediction import frozen_features

if TYPE_CHECKING:
    from ..runs.result import Result
    from .config import DriftConfig
    from .learner import Learner


def learn_drift(learner: Learner, drift: Drift, detector: Detector | None = None, *, told: bool = False) -> Result:
    """Find out where tasks begin and which come back, on features of the frozen model; then learn the parts in order.

    The whole stream is cut up first; since a decision of the detector depends on nothing that comes after it, the parts
    are those that would have been found as the examples came. A part that reopens a task goes on with its adapter where
    the recipe keeps one for every task (`color`, `routed`); any other recipe learns part after part.

    Args:
        detector: the default one, if none is given; an unused one.
        told: take the true boundaries instead, to see what finding them costs.

    Raises:
        PerpetuneError: as `Learner.learn`.
    """
    detector, stream = detector or Detector(), drift.stream
    if told:
        found = told_segments(drift)
    else:
        found = detector.read(frozen_features(learner.setup, drift.rows, stream.modality, stream.labels))
    return learner.learn(parts(drift, found, detector, told=told))


def learn(learner: Learner, stream: Stream, how: DriftConfig | None) -> Result:
    """Learn a stream as a configuration says: task after task, or without boundaries."""
    if how is None:
        return learner.learn(stream)
    return learn_drift(learner, how.feed(stream), Detector(how.level, how.window), told=how.told)


def told_segments(drift: Drift) -> list[Segment]:
    """The true segments, as if they had been found at once."""
    order = list(dict.fromkeys(drift.truth.tolist()))
    return [Segment(start, stop, order.index(task), start) for start, stop, task in drift.segments]


def parts(drift: Drift, found: Sequence[Segment], detector: Detector | None = None, *, told: bool = False) -> Stream:
    """The stream whose tasks are the segments found, `part-01` and so on; what was found stands in its `source`.

    A part has the classes that examples of its task have had so far. Its test set is that of the true tasks whose
    segments lie in it for the most part, so that each is measured at least once; where there are none, of the task of
    most of its examples.
    """
    detector = detector or Detector()
    visits: dict[int, list[int]] = {}  # part -> true tasks
    for start, stop, task in drift.segments:
        shared = [min(stop, part.stop) - max(start, part.start) for part in found]
        visits.setdefault(int(np.argmax(shared)), []).append(task)
    tasks: list[Task] = []
    classes: dict[int, tuple[int, ...]] = {}
    last: dict[int, str] = {}  # of a discovered task, the name of its newest part
    described = []
    for i, part in enumerate(found):
        rows = drift.rows.select(range(part.start, part.stop))
        most = int(np.bincount(drift.truth[part.start : part.stop]).argmax())
        tested = [drift.stream.tasks[t] for t in dict.fromkeys(visits.get(i, [most]))]
        classes[part.task] = tuple(sorted({*classes.get(part.task, ()), *rows["label"][:]}))
        name = f"part-{i + 1:02d}"
        test = datasets.concatenate_datasets([task.test for task in tested])
        captions = any(task.captions for task in tested)
        tasks.append(Task(name, classes[part.task], rows, test, reopens=last.get(part.task), captions=captions))
        last[part.task] = name
        described.append({**asdict(part), "name": name, "tested": {task.name: len(task.test) for task in tested}})
    names = [task.name for task in drift.stream]
    facts = {
        **drift.settings,
        "told": told,
        "level": detector.level,
        "window": detector.length,
        "parts": described,
        "true": [{"start": start, "stop": stop, "task": names[task]} for start, stop, task in drift.segments],
        "figures": boundary_figures(described, drift.truth, detector.length),
    }
    return replace(
        drift.stream,
        name=f"{drift.stream.name}-drift",
        tasks=tuple(tasks),
        source={**drift.stream.source, "drift": facts},
    )


def drift_facts(result: Result) -> dict[str, Any] | None:
    """What was found in the stream of a run, and what is truly there; None where the tasks were given."""
    found = (result.config["stream"].get("source") or {}).get("drift")
    return found if isinstance(found, dict) else None


def accuracy_by_true_task(result: Result, head: str, scenario: str) -> dict[str, float]:
    """Accuracy at the end on the test set of every true task, however its examples were cut up.

    Where several parts have the test set of a task, that of the newest part is taken.
    """
    rows, targets = result.predictions(head, scenario)
    right: dict[str, float] = {}
    facts = drift_facts(result) or {"parts": ()}
    for part in facts["parts"]:
        if part["name"] not in rows[-1]:
            continue
        hit, start = rows[-1][part["name"]] == targets[part["name"]], 0
        for name, size in part["tested"].items():
            right[name] = float(hit[start : start + size].mean())
            start += size
    return right


def drift_summary(result: Result) -> list[str]:
    """Lines for the command line; none where the tasks were given."""
    facts = drift_facts(result)
    if facts is None:
        return []
    f = facts["figures"]
    figures = {name: "undefined" if f[name] is None else f"{f[name]:.3g}" for name in ("precision", "recall", "delay")}
    lines = [
        f"  boundaries {'told' if facts['told'] else 'found'}: {f['boundaries_found']} of {f['boundaries_true']}, "
        f"precision {figures['precision']}, recall {figures['recall']}, noticed after {figures['delay']} examples; "
        f"{f['tasks_found']} tasks of {f['tasks_true']}, purity {f['purity']:.3f}"
    ]
    for head, scenario in result.readings:
        right = accuracy_by_true_task(result, head, scenario)
        each = ", ".join(f"{name} {100 * value:.1f}" for name, value in right.items())
        lines.append(f"  true tasks, head {head}, {scenario}: mean {100 * np.mean(list(right.values())):.1f} ({each})")
    return lines
