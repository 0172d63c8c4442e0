"""A model with a state for every task: how its states are read, and how what they say becomes one prediction."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..heads import Head
from .base import Session


class Reading:
    """Some inputs under the states of a model.

    Args:
        count: how many inputs, N.
        read: `read(t, rows)` gives what heads read of some of them (rows: indices, n) under the state of task t,
            (n x width); with t = None, what a router reads, (n x pooled_width).
    """

    def __init__(self, count: int, read: Callable[[int | None, Tensor], Tensor]) -> None:
        self.count, self.read = count, read
        self._made: dict[str, Any] = {}

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What is made of all inputs, made when it is first asked for."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def all(self, task: int | None) -> Tensor:
        """Every input under one state."""
        return self.read(task, torch.arange(self.count))


class PerTaskStates(ABC):
    """What a consolidation offers beside its own contract where the model has a state for every task.

    `scores` is the hook in which an ensemble routes, mixes or concatenates.

    Attributes:
        needs_task: whether the task of an input must be given.
        routes: whether inputs are divided among the states, so that it can be measured how well.
        blocks: whether heads read what all states make of an input, side by side.
    """

    needs_task: bool = False
    routes: bool = False
    blocks: bool = False

    @abstractmethod
    def view(self, task: int | None) -> AbstractContextManager[None]:
        """The model in the state of a task; None: as a router reads inputs whose task is not known yet."""

    @abstractmethod
    def task_classes(self, task: int) -> tuple[int, ...]:
        """The classes of a task."""

    @abstractmethod
    def goes_on_from(self, session: Session) -> int | None:
        """The earlier session whose state, and rows of the head, this one goes on training; None: no earlier one."""

    def read_width(self, width: int) -> int:
        """The width of what heads that gather read, where the features of one state have this width."""
        return width

    @abstractmethod
    def weights(self, reading: Reading, task: int | None = None) -> Tensor:
        """log p(task | x), (N x T), -inf for states that an input is not shown to.

        Args:
            task: the true one, where it is known; used only by what `needs_task`.
        """

    @abstractmethod
    def scores(self, head: Head, classes: int, reading: Reading, weights: Tensor) -> Tensor:
        """Scores of all classes, (N x C).

        Args:
            classes: C; weights: see `weights`.
        """

    @abstractmethod
    def observed(self, reading: Reading) -> Tensor:
        """What heads gather statistics of: the training samples of the newest task (N x width)."""


def only(task: int, count: int, tasks: int) -> Tensor:
    """Weights that show all of N inputs to the state of one of T tasks, (N x T)."""
    weights = torch.full((count, tasks), -torch.inf)
    weights[:, task] = 0
    return weights


def by_likeliest_state(states: PerTaskStates, weights: Tensor, read: Callable[[list[int]], list[Any]]) -> list[Any]:
    """Texts (or figures) for N inputs, each read under the likeliest of the states that it is shown to.

    Args:
        weights: (N x T); read: those of some of the inputs, by their indices.
    """
    found, route = [""] * len(weights), weights.argmax(1)
    for t in route.unique().tolist():
        rows = (route == t).nonzero().flatten().tolist()
        with states.view(t):
            for i, text in zip(rows, read(rows), strict=True):
                found[i] = text
    return found
