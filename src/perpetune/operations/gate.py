"""Whether the newest task of a run may stay, or another go: judged by the predictions in its commits, no model read."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from ..core.errors import ConfigError, RunError, nearest
from ..core.measurement import broken_promise
from ..learning.language_losses import LOSS
from ..metrics.accuracy import AccuracyMatrix, measured_mean
from ..metrics.flips import RIGHT
from ..metrics.uncertainty import coarseness
from ..runs.result import BEFORE, Result
from .verdict import MOST_CLASSES, Before, Loss, Verdict, nats

MAX_FORGETTING, MIN_GAIN = 0.02, 0.01
ROUNDING = 1e-9  # accuracies are quotients of whole numbers: far apart, but a difference of two may miss 0.02 by a bit
MAJORITY = "its most frequent class alone"
ONE_CLASS = "a model that does not know its one class"
NOT_EVALUATED = f"{MAJORITY} (the model before it was not evaluated)"


def judge(
    result: Result,
    *,
    max_forgetting: float | None = None,
    min_gain: float | None = None,
    max_flips: int | None = None,
    max_loss_increase: float | None = None,
    min_class_accuracy: float | None = None,
    head: str | None = None,
    scenario: str | None = None,
) -> Verdict:
    """Judge the newest of T tasks, or, where the newest commit takes one out, what that did to the others.

    With a(i, j) as in `metrics.accuracy`, and T-1 the commit before: a(T-1, j) - a(T, j) <= max_forgetting for every
    earlier task j, and a(T, T) - r >= min_gain, where r is a(T-1, T) if the head could name the classes then, else b_T,
    else the share of the task's most frequent class (in an older run also where the head could, but was not evaluated:
    `against` then tells). Earlier tasks whose test data is gone are not judged, and named. Where a task was taken out,
    the first of these for all others.

    Args:
        max_forgetting, min_gain: fractions; None takes 0.02, two points, and 0.01.
        max_flips: examples of all earlier tasks together that may be wrong now and were right before.
        max_loss_increase: nats a token by which the loss of a language model on the responses of an earlier task may
            have risen since the task was learned.
        min_class_accuracy: what every class of the newest task must reach at least, a fraction.
        head, scenario: which reading; None takes the first head, and the scenario of the stream.

    Raises:
        ConfigError: settings out of range, an unknown head or scenario, tasks that were learned all at once, earlier
            tasks that were not evaluated (evaluate_every), or a limit on losses that were not measured.
        RunError: nothing is learned yet.
    """
    max_forgetting = MAX_FORGETTING if max_forgetting is None else max_forgetting
    min_gain = MIN_GAIN if min_gain is None else min_gain
    shares = {"max-forgetting": max_forgetting, "min-gain": min_gain, "min-class-accuracy": min_class_accuracy}
    for name, value in shares.items():
        if value is not None and not -1 <= value <= 1:
            raise ConfigError(f"{name} is a fraction, 0.02 for two points, not {value}")
    if max_flips is not None and max_flips < 0:
        raise ConfigError(f"max-flips is a number of examples, not {max_flips}")
    if max_loss_increase is not None and not math.isfinite(max_loss_increase):
        raise ConfigError(f"max-loss-increase is a number of nats a token, not {max_loss_increase}")
    if not result.tasks:
        raise RunError(f"{result.path} has learned no task yet: there is nothing to judge")
    head, scenario = _reading(result, head, scenario)
    newest, task = result.commits[-1].manifest, result.tasks[-1]
    old, new = (result.scores_at(commit, head, scenario) for commit in result.commits[-2:])
    _, targets = result.predictions(head, scenario)
    earlier = [j for j in result.tasks if j in result.commits[-2].manifest["learned"]]
    accuracy, reference, against = None, None, ""
    if "reverts" in newest:
        task = newest["reverts"]
    elif len(earlier) != len(result.tasks) - 1:
        raise ConfigError(f"{result.path} learned its tasks all at once: there is no newest task to judge")
    else:
        accuracy = float(new[task].mean())
        before = {**old, **result.scores_at(result.commits[-1], head, scenario, BEFORE)}
        untouched = result.baseline_scores(head, scenario)
        references = ((before if earlier else {}, "the model before it"), (untouched, "the untouched model"))
        known = ((float(found[task].mean()), what) for found, what in references if task in found)
        reference, against = next(known, _constant(result, targets.get(task), untouched))
    own = [] if accuracy is None else result.per_class(head, scenario, [task])
    tasks, classes = [], []
    gone = [j for j in earlier if j in newest.get("not_evaluated", ())]
    earlier = [j for j in earlier if j not in gone]
    if missing := [j for j in earlier if j not in old or j not in new]:
        raise ConfigError(
            f"`{missing[0]}` was not evaluated both before and after the newest task: learn with evaluate_every: 1"
        )
    for j in earlier:
        tasks.append(_before(j, old[j], new[j]))
        for c in np.unique(targets[j]) if j in targets else ():
            name, where = f"{j}: {result.config['stream']['labels'][c]}", targets[j] == c
            classes.append(_before(name, old[j][where], new[j][where]))
    tasks.sort(key=lambda b: (-b.drop, -b.flips, b.name))
    classes.sort(key=lambda b: (-b.drop, -b.flips, b.name))
    losses = _losses(result, earlier)
    if max_loss_increase is not None and len(losses) < len(earlier):
        raise ConfigError(
            f"{result.path} did not measure the loss on the responses of every earlier task, both when it was learned "
            "and now, as runs of a language model do that is one for all tasks: leave out --max-loss-increase"
        )
    broken = [g for g in result.guarantees if g["holds"] is False]  # what broke once is not mended by another task
    verdict = Verdict(
        task,
        head,
        scenario,
        accuracy,
        reference,
        against,
        tuple(tasks),
        tuple(c for c in classes[:MOST_CLASSES] if c.drop > 0),
        losses,
        tuple(broken_promise(g, newest["task"]) for g in broken),
        (),
        measured_mean([c.accuracy for c in own]),
        tuple(str(c.label) for c in own if c.accuracy == 0),
        tuple(_last_measured(result.matrix(head, scenario), j) for j in gone),
    )
    low = [c for c in own if min_class_accuracy is not None and c.accuracy < min_class_accuracy - ROUNDING]
    rare = [
        f"of class `{c.label}` of `{task}` {100 * c.accuracy:.1f} % are right ({c.examples} examples), asked for are "
        f"{100 * (min_class_accuracy or 0):g}"
        for c in low[:MOST_CLASSES]
    ]
    failures = _failures(verdict, max_forgetting, min_gain, max_flips, max_loss_increase)
    size = len(new[task]) if accuracy is not None else 0
    return replace(verdict, failures=(*rare, *failures), coarse=_coarse(verdict, size, max_forgetting, min_gain))


def _coarse(v: Verdict, size: int, max_forgetting: float, min_gain: float) -> str:
    """The limit that is finest against its test set, where it is finer than one example or one standard error."""
    checked = [("max-forgetting", max_forgetting, t.name, t.now, t.examples) for t in v.tasks]
    checked += [("min-gain", min_gain, v.task, v.accuracy, size)] if v.accuracy is not None else []
    found = [
        (
            1 / n,
            f"{name} of {100 * limit:g} points is finer than the test set of `{task}` can tell ({n} examples): {than}",
        )
        for name, limit, task, now, n in checked
        if (than := coarseness(limit, now, n))
    ]
    more = f"; so it is for {len(found) - 1} more" if len(found) > 1 else ""
    return max(found)[1] + more if found else ""


def _last_measured(matrix: AccuracyMatrix, task: str) -> str:
    """The task, and its accuracy when it was last evaluated."""
    column = matrix.values[:, matrix.tasks.index(task)]
    measured = np.flatnonzero(~np.isnan(column))
    if not len(measured):
        return f"`{task}`"
    return f"`{task}` (last {100 * column[measured[-1]]:.1f}, after `{matrix.tasks[measured[-1]]}`)"


def _failures(
    v: Verdict, max_forgetting: float, min_gain: float, max_flips: int | None, max_loss_increase: float | None
) -> tuple[str, ...]:
    found = [
        f"`{t.name}` got worse by {100 * t.drop:.1f} points, allowed are {100 * max_forgetting:g}"
        for t in v.tasks
        if t.drop > max_forgetting + ROUNDING
    ]
    if v.gain is not None and v.gain < min_gain - ROUNDING:
        found.append(f"`{v.task}` gained {100 * v.gain:.1f} points over {v.against}, asked for are {100 * min_gain:g}")
    if max_flips is not None and v.flips > max_flips:
        found.append(f"{v.flips} examples were right before and are wrong now, allowed are {max_flips}")
    limit = math.inf if max_loss_increase is None else max_loss_increase + ROUNDING
    found += [
        f"the loss of `{x.name}` rose from {nats(x.learned)} to {nats(x.now)} nats a token since it was learned, "
        f"allowed are {max_loss_increase:g} more"
        for x in v.losses
        if x.rise > limit
    ]
    return (*found, *(f"broken promise: {text}" for text in v.broken))


def _constant(result: Result, target: np.ndarray | None, untouched: dict[str, np.ndarray]) -> tuple[float, str]:
    """What a task is judged against where no earlier model could name its classes: always predicting the most frequent
    one, so that an imbalanced task is not passed for its largest class. Free texts: 0."""
    if target is None:
        return 0.0, "no answer"
    if target.min() == target.max():  # always predicting its one class is right, and what that costs, the others tell
        return 0.0, ONE_CLASS
    # a head that named classes of a task before it was learned knows them by their texts
    nameable = bool(untouched) or {*target.tolist()} <= {*result.commits[-2].manifest["classes"]}
    return float(np.bincount(target).max() / len(target)), NOT_EVALUATED if nameable else MAJORITY


def _before(name: str, was: np.ndarray, now: np.ndarray) -> Before:
    lost = (was >= RIGHT) & (now < RIGHT)
    return Before(name, float(was.mean()), float(now.mean()), int(lost.sum()), len(now))


def _losses(result: Result, tasks: list[str]) -> tuple[Loss, ...]:
    """Of tasks whose loss was measured both before the newest commit and then."""
    *before, now = (
        {name: loss for g in c.manifest["guarantees"] if g["name"] == LOSS for name, loss, _ in g["parts"]}
        for c in (*(c for c in result.active if c != result.commits[-1]), result.commits[-1])
    )
    found = [
        Loss(task, next(losses[task] for losses in before if task in losses), now[task])
        for task in tasks
        if task in now and any(task in losses for losses in before)
    ]
    return tuple(sorted(found, key=lambda loss: (-loss.rise, loss.name)))


def _reading(result: Result, head: str | None, scenario: str | None) -> tuple[str, str]:
    readings = result.readings
    if not readings:
        raise ConfigError(f"{result.path} has predicted nothing yet: no task that it has learned has test data")
    heads = list(dict.fromkeys(h for h, _ in readings))
    if head is not None and head not in heads:
        raise ConfigError(f"this run reads no head `{head}`: {nearest(head, heads)}")
    head = head or heads[0]
    kinds = [s for h, s in readings if h == head]
    if scenario is not None and scenario not in kinds:
        raise ConfigError(f"this run has no scenario `{scenario}`: {nearest(scenario, kinds)}")
    return head, scenario or result.config["stream"]["scenario"]
