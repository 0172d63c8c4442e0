"""What changed between two points of a run: weight by weight, and where the masks of tasks meet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..consolidation.delta_merge import VALUES, stored_delta
from ..core.errors import ConfigError, RunError, nearest
from ..deltas.overlap import overlap
from ..learning.export import plain
from ..learning.learner import Learner
from ..metrics.energy import relative_energy_change, row_norm_change
from ..runs.commit import Commit, active
from ..runs.directory import Run

if TYPE_CHECKING:
    from rich.console import Group


GEOMETRY = ("row_norms", "energy")
MOST_ROWS = 8192  # energy takes the square of their number; embeddings have many more


@dataclass(frozen=True)
class Change:
    """Of one weight W, with W_a and W_b its values at the two points.

    Attributes:
        entries: of W. changed: how many differ. norm: ||W_b - W_a||_F. size: ||W_a||_F.
        row_norms, energy: of a changed matrix, if asked for: the largest relative change of the length of a row, and
            the relative change of its hyperspherical energy (`metrics.energy`).
    """

    name: str
    entries: int
    changed: int
    norm: float
    size: float
    row_norms: float | None = None
    energy: float | None = None

    @property
    def relative(self) -> float | None:
        """||W_b - W_a||_F / ||W_a||_F; None where W_a is 0."""
        return self.norm / self.size if self.size else None


@dataclass(frozen=True)
class Meeting:
    """How many entries the masks of two tasks share.

    Attributes:
        share: of the entries that `task` keeps, those that `other` keeps too. chance: what masks drawn independently
            would share.
    """

    task: str
    other: str
    common: int
    share: float
    chance: float


@dataclass(frozen=True)
class Difference:
    """
    Attributes:
        before, after: names of the two points.
        changes: of all weights, the largest relative change first; weights that were 0 come last.
        meetings: of the masks of tasks learned between the two points with those of all tasks before them, at the later
            point.
    """

    before: str
    after: str
    changes: tuple[Change, ...]
    meetings: tuple[Meeting, ...]

    @property
    def total(self) -> Change:
        """All weights as one."""
        c = self.changes
        norm, size = (math.sqrt(sum(getattr(x, k) ** 2 for x in c)) for k in ("norm", "size"))
        worst = [max((abs(v) for x in c if (v := getattr(x, k)) is not None), default=None) for k in GEOMETRY]
        return Change("all weights", sum(x.entries for x in c), sum(x.changed for x in c), norm, size, *worst)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        rows = [{**asdict(c), "relative": c.relative} for c in (self.total, *self.changes)]
        meetings = [asdict(m) for m in self.meetings]
        return {"before": self.before, "after": self.after, "total": rows[0], "changes": rows[1:], "masks": meetings}

    def table(self, most: int | None = 20) -> Group:
        """For a terminal; `most` weights."""
        from rich.console import Group
        from rich.markup import escape
        from rich.table import Column, Table

        moved = [c for c in self.changes if c.changed]
        table = Table(
            Column("weight", overflow="fold"), "relative change", "entries changed", title_justify="left", box=None
        )
        geometry = self.total.energy is not None
        for title in ("row norms", "energy") if geometry else ():
            table.add_column(title)
        for c in (self.total, *moved[:most]):
            relative = "was 0" if c.relative is None else f"{c.relative:.2e}"
            more = ["" if v is None else f"{v:.1e}" for v in (c.row_norms, c.energy)] if geometry else []
            table.add_row(escape(c.name), relative, f"{100 * c.changed / c.entries:.2f} % of {c.entries:,}", *more)
        lines = [f"from `{self.before}` to `{self.after}`: {len(moved)} of {len(self.changes)} weights changed"]
        if most is not None and len(moved) > most:
            lines.append(f"{len(moved) - most} more changed weights: --all shows them")
        lines += [
            f"masks of `{m.task}` and `{m.other}` share {m.common:,} entries: {100 * m.share:.2f} % of those that "
            f"`{m.task}` keeps, by chance {100 * m.chance:.2f} %"
            for m in self.meetings
        ]
        return Group(escape(lines[0]), table, *map(escape, lines[1:]))


def difference(
    path: str | Path,
    before: str | None = None,
    after: str | None = None,
    *,
    model: str | None = None,
    geometry: bool = False,
) -> Difference:
    """What changed from one point of a run to another.

    Both states are rebuilt from the base model and the commits; they are compared one weight at a time. Adapters are
    merged into the weights; where no weight can hold them, their own tensors are compared, 0 where there were none.

    Args:
        before, after: names or numbers of points: "untouched" or 0 is the base, the name of a task the model after it,
            "revert-NAME" the model after that was taken out, k the model after the k-th of these. None: before and
            after the newest.
        model: the base model, if it is not where it was.
        geometry: measure lengths of rows and hyperspherical energy of changed matrices of up to `MOST_ROWS` rows.

    Raises:
        ConfigError: an unknown point, or a recipe without a network or with an adapter for every task.
        RunError: no run is there, it is damaged, or nothing is learned yet.
    """
    commits = Run.read(path).commits
    if len(commits) < 2:
        raise RunError(f"{path} has learned no task yet: there is nothing to compare")
    names = [commit.manifest["task"] for commit in commits]
    a = len(names) - 2 if before is None else _point(before, names)
    b = len(names) - 1 if after is None else _point(after, names)
    learner = Learner.open(path, model=model)
    if not learner.backbone.network:
        raise ConfigError(f"recipe `{learner.recipe.name}` has no network, so no weights to compare")
    if learner.recipe.consolidation.states is not None:
        raise ConfigError(
            f"recipe `{learner.recipe.name}` keeps an adapter for every task, and the weights of the model are those "
            "of the base at every point: export the model of one task (perpetune export RUN --only TASK)"
        )
    old, new = (_state(learner, commits, k) for k in (a, b))
    changes = [_change(name, old.get(name), new.get(name), geometry) for name in {**old, **new}]
    changes.sort(key=lambda c: (c.relative is None, -(c.relative or 0), c.name))
    first, last = sorted((a, b))
    known = active(commits[: last + 1])
    later = sum(commits.index(commit) > first for commit in known)
    return Difference(names[a], names[b], tuple(changes), _meetings(known, len(known) - later))


def _point(text: str, names: Sequence[str]) -> int:
    if text in names:
        return names.index(text)
    if text.isdigit() and int(text) < len(names):
        return int(text)
    raise ConfigError(
        f"this run has no point `{text}` (a name, or a number up to {len(names) - 1}): {nearest(text, names)}"
    )


def _state(learner: Learner, commits: Sequence[Commit], point: int) -> dict[str, Tensor]:
    """All weights at a point; those under several names once."""
    if point == len(commits) - 1:
        backbone, consolidation = learner.backbone, learner.recipe.consolidation
    else:
        backbone, consolidation = learner.fresh()
        consolidation.restore(active(commits[: point + 1]))
    extra: dict[str, Tensor] = {}
    try:
        model = plain(backbone.model, commits[point].path)
    except ConfigError:
        extra = consolidation.tuner.tensors(backbone.model)
        model = consolidation.tuner.detach(backbone.model)
    state = model.state_dict(keep_vars=True)
    first = {id(t): name for name, t in reversed(state.items())}
    return {name: t for name, t in state.items() if first[id(t)] == name} | extra


def _change(name: str, old: Tensor | None, new: Tensor | None, geometry: bool) -> Change:
    like = new if old is None else old
    assert like is not None
    a, b = ((torch.zeros_like(like) if t is None else t).detach().cpu().double() for t in (old, new))
    change = Change(name, a.numel(), int((a != b).sum()), float((b - a).norm()), float(a.norm()))
    if not (geometry and change.changed and a.ndim == 2 and min(a.shape) > 1 and len(a) <= MOST_ROWS):
        return change
    return replace(change, row_norms=row_norm_change(b, a), energy=relative_energy_change(b, a))


def _meetings(commits: Sequence[Commit], first: int) -> tuple[Meeting, ...]:
    """Of the masks of all tasks from number `first` (0-based) on with those before them."""
    if not all(commit.has(VALUES) for commit in commits):
        return ()
    deltas = [stored_delta(commit) for commit in commits]
    sizes = [sum(part.size for part in d.parts.values() if part.mask != "dense") for d in deltas]
    found = overlap(deltas)
    kept = found.common.diagonal()
    names = [commit.manifest["task"] for commit in commits]
    return tuple(
        Meeting(names[i], names[j], int(found.common[i, j]), float(found.share[i, j]), float(kept[j] / sizes[j]))
        for i in range(first, len(deltas))
        for j in range(i)
        if kept[j] < sizes[j]
    )
