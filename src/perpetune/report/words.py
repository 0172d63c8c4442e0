"""Verdicts and metrics in words that readers outside the field understand, and how figures are formatted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from .summary import Group, Row, Stat


@dataclass(frozen=True)
class Metric:
    """A column: its title, its meaning, whether "higher" or "lower" is better, and where it is undefined."""

    key: str
    title: str
    meaning: str
    better: str
    undefined: str
    always: bool = True


_ONE_BY_ONE = "the recipe does not learn tasks one by one"
_LATER = "fewer than two tasks were learned one after another"
METRICS = (
    Metric("final_accuracy", "final accuracy", "Accuracy after the last task, averaged over tasks.", "higher",
           "the run has not reached the last task"),
    Metric("final_accuracy_micro", "final accuracy, micro", "The same, with equal weight for every test example.",
           "higher", "the run has not reached the last task", always=False),
    Metric("final_accuracy_macro", "final accuracy, macro",
           "The same, with equal weight for every class: a rare class that is never predicted shows.", "higher",
           "a task was not evaluated at the end, or has no classes", always=False),
    Metric("average_incremental_accuracy", "average incremental accuracy",
           "Accuracy on the tasks learned so far, averaged over all points in training.", "higher", _ONE_BY_ONE),
    Metric("average_incremental_accuracy_micro", "average incremental accuracy, micro",
           "The same, with equal weight for every test example.", "higher", _ONE_BY_ONE,
           always=False),
    Metric("forgetting", "forgetting",
           "How far accuracy on earlier tasks has dropped below its best. Negative: later tasks helped.",
           "lower", _LATER),
    Metric("backward_transfer", "backward transfer",
           "How later tasks have changed accuracy on earlier tasks. Negative: they hurt it.", "higher", _LATER),
    Metric("forward_transfer", "forward transfer",
           "Accuracy on a task right before it is learned, minus that of the untouched model.", "higher",
           "the head cannot name classes it has not seen, or the untouched model was not evaluated"),
    Metric("plasticity", "plasticity",
           "Accuracy on each task right after it is learned: how well the model learns new tasks.",
           "higher", _ONE_BY_ONE),
    Metric("intransigence", "intransigence", "How far plasticity stays below joint or single-task training.",
           "lower", "there is no joint or single-task result to compare with"),
    Metric("flips", "flips", "Share of test examples that were correct at some point and are wrong at the end.",
           "lower", "no earlier predictions are stored"),
    Metric("routing_accuracy", "routing accuracy",
           "Test examples that the router sends to their own task, after the last task, averaged over tasks.", "higher",
           "the recipe does not keep one adapter per task", always=False),
)  # fmt: skip

SCENARIOS = {
    "class": "the model chooses among the classes of all tasks learned so far and is not told the task",
    "domain": "all tasks share the same classes; only the data changes",
    "task": "the model is told the task of each example and chooses among the classes of that task",
}

ROUTES = (
    "Each task has an adapter of its own, and a router picks the adapter for an input. Shown is its first choice after "
    "the last task, of 100 test examples. Where tasks share no classes and only one adapter runs, the prediction for "
    "an input that goes to the wrong task is wrong: routing accuracy is an upper bound of accuracy."
)


def code(name: str) -> Markup:
    return Markup("<code>{}</code>").format(name)


def of100(value: float) -> str:
    return f"{100 * value:.0f}"


def lost(value: float | None, brief: bool = False) -> str:
    """Second half of a sentence about one recipe: how much of the earlier tasks it has forgotten."""
    if value is None:
        return ""
    points = round(100 * value)
    if points == 0:
        return " and has forgotten next to nothing"
    unit = "point" if abs(points) == 1 else "points"
    if points < 0:
        return f", and later tasks even helped the earlier tasks by {-points} {unit}"
    return f" and has forgotten {points}" if brief else f" and has forgotten {points} {unit} on the earlier tasks"


def verdict(group: Group) -> tuple[Markup, list[Markup]]:
    """One plain sentence (or two), and remarks that keep it honest."""
    known = [row for row in group.ranked if row.mean("final_accuracy") is not None]
    if not known:
        return Markup("The run has not reached the last task yet, so there is no final accuracy."), []
    return _one(known[0]) if group.by_task else _several(known)


def _start(row: Row) -> Markup:
    count = len(row.tasks)
    if row.role == "bound":
        return Markup("Trained on all {} tasks at once, {} gets").format(count, code(row.recipe))
    if count == 1:
        return Markup("After a single task, {} gets").format(code(row.recipe))
    return Markup("After learning {} tasks one after another, {} gets").format(count, code(row.recipe))


def _one(row: Row) -> tuple[Markup, list[Markup]]:
    final, forgotten = row.mean("final_accuracy"), row.mean("forgetting")
    assert final is not None
    average = " on average" if len(row.tasks) > 1 else ""
    loss = lost(forgotten) if row.role != "bound" else ""
    head = Markup("{} {} of 100 test examples right{}{}.").format(_start(row), of100(final), average, loss)
    notes = []
    learned = row.mean("plasticity")
    if len(row.tasks) == 1:
        notes.append(Markup("With a single task there is nothing to forget yet."))
    elif row.role == "bound":
        notes.append(Markup("It learns all tasks together and cannot forget: an upper bound."))
    elif learned is not None:
        notes.append(Markup("Right after learning each task it got {} of 100.").format(of100(learned)))
    return head, notes


def _several(known: Sequence[Row]) -> tuple[Markup, list[Markup]]:
    learners = [row for row in known if row.role != "bound"]
    bound = next((row for row in known if row.role == "bound"), None)
    if not learners:
        return _one(known[0])
    methods = sorted((row for row in learners if row.role == "method"), key=lambda row: row.keeps_examples)
    trained = [row for row in learners if row.recipe == "sequential"] or methods or learners
    reference = next((row for row in trained if row.recipe == "sequential"), trained[-1])
    best = (methods or learners)[0]
    final, top = _final(reference), _final(best)
    head = Markup("{} {} of 100 test examples right on average{}").format(
        _start(reference), of100(final), lost(reference.mean("forgetting"))
    )
    if best is reference:
        head += Markup(".")
    elif top - final >= 0.005:
        head += Markup("; {} gets {}{}.").format(
            code(best.recipe), of100(top), lost(best.mean("forgetting"), brief=True)
        )
    else:
        head += Markup(". None of the recipes here does better.")
    notes = []
    control = next((row for row in learners if row.role == "control" and row.recipe != "sequential"), None)
    if control is not None and control is not best and best.role == "method" and _final(control) >= top - 0.005:
        more = "more than" if _final(control) >= top + 0.005 else "as much as"
        notes.append(
            Markup("But the control {} ({}) gets {}: {} every recipe that trains the model.").format(
                code(control.recipe), control.why, of100(_final(control)), more
            )
        )
    if bound is not None:
        text = "Training on all tasks at once ({}), which is impossible when tasks arrive one by one, gets {}."
        notes.append(Markup(text).format(code(bound.recipe), of100(_final(bound))))
    return head, notes


def _final(row: Row) -> float:
    value = row.mean("final_accuracy")
    assert value is not None
    return value


def dash(reason: str) -> Markup:
    return Markup('<abbr class="none" title="undefined: {}">–</abbr>').format(reason)


def percent(stat: Stat, reason: str) -> Markup:
    """`57.7 ± 1.2`, in percent; a dash with the reason where it is undefined."""
    if stat.mean is None:
        return dash(reason)
    mean = f"{100 * stat.mean:.1f}".replace("-", "−")
    spread = "" if stat.spread is None else Markup(" <small>± {}</small>").format(f"{100 * stat.spread:.1f}")
    return Markup("{}{}").format("0.0" if mean == "−0.0" else mean, spread)


def figure(value: float | None, unit: str = "") -> str:
    """A measured figure of any size, three digits."""
    if value is None or math.isnan(value):
        return "not a number"
    if unit == "bytes" and math.isfinite(value):
        return size(value)
    if math.isinf(value):
        written = "∞" if value > 0 else "-∞"
    else:
        written = f"{value:.0f}" if value.is_integer() and abs(value) < 1e6 else f"{value:.3g}"
    written = written.replace("e-0", "e-").replace("e+0", "e+").replace("-", "−")
    return f"{written} {unit}".strip()


def size(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def seconds(value: float) -> str:
    if value < 60:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def count(value: float) -> str:
    return f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")
