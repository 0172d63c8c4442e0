"""What routers by ridge share: sums over the samples of each task, exact in any order, from which they are fitted.

The sum over all tasks is held: a new task is added to it, and one that is forgotten or observed again is taken out.
Since sums are exact, the bits are those of a sum made anew.

Tasks with too few samples for moments of their own share what the hold-outs of all tasks say together. These are sums,
too: neither the order of tasks matters nor a task that was taken out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..heads.exact_sums import FEATURES, GAUSSIAN
from ..heads.holdout import Linear
from ..heads.lda_ridge import SCALE
from ..heads.moments import MomentsHead
from ..heads.ridge import FEWEST, RidgeHead, solve
from ..heads.statistics import symmetric
from .base import Router, RouterError, State

SHOWN = 128  # classes of which the expected log-loss is taken, where there are many


@dataclass
class SumsRouter(Router):
    """Stores of each task the state of a `RidgeHead`, or of another head on moments, that has seen this task alone.

    A subclass has the settings `features`, `holdout` and `bits` of that head, names the `kinds` that it counts apart
    within a task, and fits itself in `fit`. A router with `together` has a posterior as soon as all tasks together have
    10 samples in either fold: one temperature for all of them, see `tempered`.
    """

    many_tasks, together = False, False
    features: Any = field(init=False, repr=False, compare=False)
    holdout: Any = field(init=False, repr=False, compare=False)
    bits: Any = field(init=False, repr=False, compare=False)
    _fitted: Any = field(default=None, init=False, repr=False, compare=False)
    _shared: tuple[float, float] | None = field(default=None, init=False, repr=False, compare=False)
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
        self._fitted = self._shared = None

    # ---- how sure it may be ----

    @property
    def enough(self) -> bool:
        """Whether tasks have samples enough in either fold for moments of their own: 10 and, of a router whose tasks
        can share theirs, half as many as there are tasks. With `many_tasks`, half of the tasks need them."""
        least = max(FEWEST, len(self.known) / 2) if self.together else FEWEST
        enough = self._folds().min(1).values >= least
        return bool(enough.all()) if not self.many_tasks else 2 * int(enough.sum()) >= len(enough)

    @property
    def enough_together(self) -> bool:
        """Whether all tasks together have samples enough to share a temperature, and do."""
        return self.together and len(self.known) > 1 and int(self._folds().sum(0).min()) >= FEWEST

    def _folds(self) -> Tensor:
        """Samples of each task in either fold, (T x 2)."""
        return torch.stack([state["counts"].sum(1) for state in self.known.values()])

    def tempered(self) -> tuple[float, float]:
        """tau with which softmax (s / tau) has the least expected log-loss of the task on the hold-outs of all tasks
        together, and this loss in nats a sample."""
        raise NotImplementedError

    def _tempered(self, head: MomentsHead, groups: Tensor | None = None) -> tuple[float, float]:
        """See `tempered`; groups: of each column of the head, its task (K,), where a task has several."""
        if self._shared is None:
            linear, unit = self._train_fold(head)
            tau, loss = head.holdout_moments(head.seen()).calibrated(linear, groups, SHOWN)
            self._shared = tau * unit, loss
        return self._shared

    def _train_fold(self, head: MomentsHead) -> tuple[Linear, float]:
        """What the train fold alone would predict with, and the unit of its scores in those of the head."""
        G, Q, _ = head.moments(head.seen())
        return (solve(G[0], Q[0], head.fit()[2]) * SCALE, None), 1 / SCALE

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
