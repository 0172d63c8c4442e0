"""What a gate has found, and how it is shown."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..core.measurement import finite

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

MOST_CLASSES, MOST_TASKS = 5, 10


@dataclass(frozen=True)
class Before:
    """Accuracy of a task, or of one class of it, before and after the newest commit.

    Attributes:
        name: of the task, or "task: class". examples: in its test set.
        flips: examples that were right and are wrong now.
    """

    name: str
    before: float
    now: float
    flips: int
    examples: int

    @property
    def drop(self) -> float:
        return self.before - self.now


@dataclass(frozen=True)
class Loss:
    """Loss of a language model on the test responses of a task, in nats a token.

    Attributes:
        learned: the first that was measured, when the task was learned; now: the last. None: not a number.
    """

    name: str
    learned: float | None
    now: float | None

    @property
    def rise(self) -> float:
        return math.inf if self.now is None or self.learned is None else self.now - self.learned


@dataclass(frozen=True)
class Verdict:
    """
    Attributes:
        task: the newest, or the one that was taken out last. accuracy: of the newest; None where one was taken out.
        macro: mean over its classes of their accuracies; None where it has none, or one was taken out.
        unjudged: earlier tasks whose test data is gone, and their last accuracies.
        coarse: that a limit is finer than what it is measured with, and by how much; empty where none is.
        never: classes of the newest of whose test examples none is right.
        reference, against: what the newest must beat, and what that is.
        tasks: every other task, the one that lost most first. classes: the worst, as far as they lost.
        losses: of every other task, where they were measured, the one that rose most first.
        broken: promises of the run that were not kept. failures: why the gate is closed; none opens it.
    """

    task: str
    head: str
    scenario: str
    accuracy: float | None
    reference: float | None
    against: str
    tasks: tuple[Before, ...]
    classes: tuple[Before, ...]
    losses: tuple[Loss, ...]
    broken: tuple[str, ...]
    failures: tuple[str, ...]
    macro: float | None = None
    never: tuple[str, ...] = ()
    unjudged: tuple[str, ...] = ()
    coarse: str = ""

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def gain(self) -> float | None:
        return None if self.accuracy is None or self.reference is None else self.accuracy - self.reference

    @property
    def flips(self) -> int:
        return sum(t.flips for t in self.tasks)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        lists = {k: [{**asdict(b), "drop": b.drop} for b in getattr(self, k)] for k in ("tasks", "classes")}
        lists["losses"] = [{**asdict(x), "rise": finite(x.rise)} for x in self.losses]
        return {"passed": self.passed, **asdict(self), **lists, "gain": self.gain, "flips": self.flips}

    def table(self) -> Group:
        """For a terminal: who got worse, and the verdict."""
        from rich.console import Group
        from rich.markup import escape
        from rich.table import Table

        losers = [t for t in self.tasks if t.drop > 0 or t.flips]
        table = Table("", "before", "now", "worse by", "right before, wrong now", box=None)
        for entry in (*losers[:MOST_TASKS], *self.classes):
            points = (f"{100 * x:.1f}" for x in (entry.before, entry.now, entry.drop))
            table.add_row(escape(entry.name), *points, f"{entry.flips} of {entry.examples}")
        what, others = ("task taken out:", "other") if self.gain is None else ("newest task", "earlier")
        lines = [f"{what} `{self.task}`, read by {self.head}, {self.scenario}-incremental"]
        if len(losers) > MOST_TASKS:
            lines.append(f"{len(losers) - MOST_TASKS} more {others} tasks got worse, by no more")
        if not losers:
            none = f"no {others} task could be judged" if self.unjudged else f"there is no {others} task"
            lines.append(f"no {others} task got worse" if self.tasks else none)
        if self.accuracy is not None and self.reference is not None:
            gain = f"{100 * (self.accuracy - self.reference):+.1f} against {self.against}"
            lines.append(
                f"`{self.task}`: {100 * self.accuracy:.1f}, {gain} ({100 * self.reference:.1f}){self._macro()}"
            )
        lines.append(f"examples of {others} tasks right before and wrong now: {self.flips}")
        if self.unjudged:
            lines.append(f"not judged, since their test data is gone: {', '.join(self.unjudged)}")
        lines += [f"NOTE: {self.coarse}"] if self.coarse else []
        lines += [f"FAIL: {reason}" for reason in self.failures] or ["PASS"]
        return Group(*([table] if losers else []), *self._spoken(), *map(escape, lines))

    def _macro(self) -> str:
        if self.macro is None:
            return ""
        never = f", none right of {', '.join(self.never[:MOST_CLASSES])}" if self.never else ""
        more = f" and {len(self.never) - MOST_CLASSES} more" if len(self.never) > MOST_CLASSES else ""
        return f"; mean over its classes {100 * self.macro:.1f}{never}{more}"

    def _spoken(self) -> list[Table]:
        from rich.markup import escape
        from rich.table import Table

        if not self.losses:
            return []
        table = Table("loss on responses, nats a token", "learned", "now", "rose by", box=None)
        for entry in self.losses[:MOST_TASKS]:
            table.add_row(escape(entry.name), *(nats(x) for x in (entry.learned, entry.now, finite(entry.rise))))
        return [table]


def nats(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.3f}"
