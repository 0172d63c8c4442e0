"""What the figures say, in words somebody outside the field understands, and how figures are written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from .summary import Group, Row, Stat


@dataclass(frozen=True)
class Metric:
    """A column: what it is called, what it means, whether more is better, and why it may be undefined."""

    key: str
    title: str
    meaning: str
    better: str
    undefined: str
    always: bool = True


_LATER = "needs at least two tasks, learned one after another"
METRICS = (
    Metric("final_accuracy", "final accuracy", "Right answers after the last task, mean over tasks.", "higher",
           "the last task was not reached"),
    Metric("final_accuracy_micro", "final accuracy, micro", "The same, each example counting alike.", "higher",
           "the last task was not reached", always=False),
    Metric("average_incremental_accuracy", "average incremental accuracy",
           "Right answers on the tasks learned so far, averaged over the whole way.", "higher",
           "only known where tasks are learned one by one"),
    Metric("average_incremental_accuracy_micro", "average incremental accuracy, micro",
           "The same, each example counting alike.", "higher", "only known where tasks are learned one by one",
           always=False),
    Metric("forgetting", "forgetting", "How far earlier tasks fell below their best. Negative: later tasks helped.",
           "lower", _LATER),
    Metric("backward_transfer", "backward transfer",
           "How later tasks changed earlier ones since they were learned. Negative: they harmed.", "higher", _LATER),
    Metric("forward_transfer", "forward transfer",
           "How much better than the untouched model a task is before it is learned.", "higher",
           "the head cannot name classes it has not seen, or the untouched model was not measured"),
    Metric("plasticity", "plasticity", "Right answers on each task right after learning it: how well it learns at all.",
           "higher", "only known where tasks are learned one by one"),
    Metric("intransigence", "intransigence", "How much worse a task is learned than by joint or single-task training.",
           "lower", "needs a joint or single-task result to compare with"),
    Metric("flips", "flips", "Share of examples that were right at some point and are wrong at the end.", "lower",
           "needs an earlier point with stored predictions"),
    Metric("routing_accuracy", "sent to its own task",
           "Test examples whose task the router finds out, after the last task, mean over tasks.", "higher",
           "the recipe has no adapter of its own for every task", always=False),
)  # fmt: skip

SCENARIOS = {
    "class": "the model must choose among the classes of all tasks seen so far and is not told which task it is",
    "domain": "all tasks ask for the same classes; what changes is the data",
    "task": "the model is told which task each example belongs to and chooses among that task's classes",
}

ROUTES = (
    "There is one adapter for every task, and a router finds out which task an input belongs to. Shown is its first "
    "choice after the last task, of 100 test examples. Where no two tasks share a class and only the adapter of the "
    "first choice is asked, an input sent astray is answered wrong: accuracy cannot be higher."
)


def code(name: str) -> Markup:
    return Markup("<code>{}</code>").format(name)


def of100(value: float) -> str:
    return f"{100 * value:.0f}"


def lost(value: float | None, brief: bool = False) -> str:
    """Second half of a sentence about one recipe: what it forgot of the earlier tasks."""
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
        return Markup("The last task has not been reached yet: there is no final figure to judge by."), []
    return _one(known[0]) if group.by_task else _several(known)


def _start(row: Row) -> Markup:
    count = len(row.tasks)
    if row.role == "bound":
        return Markup("Taught all {} tasks at once, {} gets").format(count, code(row.recipe))
    if count == 1:
        return Markup("After its only task, {} gets").format(code(row.recipe))
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
        notes.append(Markup("Nothing is learned after anything else, so nothing can be forgotten: an upper bound."))
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
            Markup("But the control {} ({}) gets {}: {} every recipe that learns the tasks.").format(
                code(control.recipe), control.why, of100(_final(control)), more
            )
        )
    if bound is not None:
        text = "Learning all tasks at once ({}), which nobody can do when tasks arrive one by one, gets {}."
        notes.append(Markup(text).format(code(bound.recipe), of100(_final(bound))))
    return head, notes


def _final(row: Row) -> float:
    value = row.mean("final_accuracy")
    assert value is not None
    return value


def dash(reason: str) -> Markup:
    return Markup('<abbr class="none" title="undefined: {}">–</abbr>').format(reason)


def percent(stat: Stat, reason: str) -> Markup:
    """`57.7 ± 1.2`, in points of 100; a dash that says why where it is undefined."""
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
