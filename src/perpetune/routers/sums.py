"""What routers by ridge share: sums over the samples of each task, exact in any order, from which they are fitted.

The sum over all tasks is held: a new task is added to it, and one that is forgotten or observed again is taken out.
Since sums are exact, the bits are those of a sum made anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..heads.exact_sums import FEATURES, GAUSSIAN
from ..heads.moments import MomentsHead
from ..heads.ridge import RidgeHead
from ..heads.statistics import symmetric
from .base import Router, RouterError, State


@dataclass
class SumsRouter(Router):
    """Stores of each task the state of a `RidgeHead`, or of another head on moments, that has seen this task alone.

    A subclass has the settings `features`, `holdout` and `bits` of that head, names the `kinds` that it counts apart
    within a task, and fits itself in `fit`.
    """

    features: Any = field(init=False, repr=False, compare=False)
    holdout: Any = field(init=False, repr=False, compare=False)
    bits: Any = field(init=False, repr=False, compare=False)
    _fitted: Any = field(default=None, init=False, repr=False, compare=False)
    _one: MomentsHead = field(init=False, repr=False, compare=False)  # for one task at a time
    _total: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _added: dict[int, tuple[State, bytes]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._one = self._head()  # checks the settings

    def kinds(self, labels: Sequence[str]) -> Sequence[str]:
        """Names of the kinds that are counted apart within a task."""
        raise NotImplementedError

    def open(self, width: int, labels: Sequence[str], *, seed: int) -> None:
        super().open(width, labels, seed=seed)
        self._one = self._opened(self.kinds(labels))
        nothing = self._one.state()
        self._total, self._added = {name: nothing[name] for name in ("gram", "clipped")}, {}

    def _head(self) -> MomentsHead:
        return RidgeHead(self.features, holdout=self.holdout, bits=self.bits)

    def _opened(self, names: Sequence[str]) -> MomentsHead:
        head = self._head()
        head.open(self.width, names, seed=self.seed)
        return head

    def _sums(self, features: Tensor, labels: Tensor, ids: Sequence[str]) -> State:
        self._one.clear()
        self._one.observe(features, labels, ids)
        return self._one.state()

    def combine(self, one: State, other: State) -> State:
        self._one.load_state(one)
        self._one.add(other)
        return self._one.state()

    def check_state(self, state: State) -> None:
        if not self.width:
            raise RouterError(f"{self._name} is not open yet: call `open(width, labels, seed=...)` first")
        self._one.check_state(state)

    def changed(self) -> None:
        self._fitted = None

    def _plain(self, head: MomentsHead, task_of: Sequence[int]) -> tuple[dict[str, Any], State]:
        """See `Router.plain`: scores s = round(h / grid[1]) theta, h = relu(f `projection`), or f where there is none,
        of features f on the grid of steps grid[0].

        Args:
            task_of: the tasks of the columns of theta (K,).
        """
        theta = head.fit()[1] * head.unit
        projected = {} if head.W is None else {"projection": (head.W * GAUSSIAN.step).float()}  # 13 bits: exact in fp32
        settings = {"type": self._name, "grid": [FEATURES.step, head.grid.step]}
        return settings, {"theta": theta, "task_of": torch.tensor(task_of), **projected}

    def _order(self) -> list[int]:
        """The tasks in an order of their own, by what is stored of them: sums of features, and of squares."""
        self._add_up()
        return sorted(self.tasks, key=lambda task: self._added[task][1])

    def _add_up(self) -> None:
        """Bring the sum over all tasks up to date: what is known of a task is never changed in place."""
        for task in [t for t, (state, _) in self._added.items() if self.known.get(t) is not state]:
            self._count(self._added.pop(task)[0], -1)
        for task in self.known.keys() - self._added.keys():
            self._count(self.known[task], 1)
            self._added[task] = self.known[task], _digest(self.known[task])

    def _count(self, state: State, sign: int) -> None:
        # as they are stored, triangles alone: there may be a thousand tasks to add up
        self._total = {name: total + sign * state[name] for name, total in self._total.items()}

    def _fit_head(self, names: Sequence[str], states: Sequence[State]) -> MomentsHead:
        """A head of these classes that has seen the samples of all tasks.

        Args:
            states: of each task, its classes in order; their classes together are the names.
        """
        head = self._opened(names)
        axes = {name: axis for name, axis in head.class_axis.items() if name in head.statistics}
        rows = {name: torch.cat([state[name] for state in states], axis) for name, axis in axes.items()}
        head.check_samples(int(rows["counts"].sum()))
        gram = symmetric(self._total["gram"], head.statistics["gram"].shape[-1])
        head.statistics = {**self._total, "gram": gram, **rows}
        head.changed()
        return head

    def _squares(self, task: int, fold: int) -> Tensor:
        """G_t, (M x M), in steps^2."""
        return symmetric(self.known[task]["gram"][fold], self._one.statistics["gram"].shape[-1])


def _digest(state: State) -> bytes:
    return hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in ("cross", "gram"))).digest()


def holds_for_most(enough: Tensor, many_tasks: bool) -> bool:
    """Whether tasks (T,) have samples enough for a posterior: all of them, or at least half where there are many."""
    return bool(enough.all()) if not many_tasks else 2 * int(enough.sum()) >= len(enough)
