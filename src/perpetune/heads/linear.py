"""The linear head: softmax regression on the features, trained with them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.errors import HeadError
from ..core.measurement import Measurement
from .readout import Readout
from .trained import Classes, TrainedHead

SPREAD = 0.02  # standard deviation of a new row


class LinearHead(TrainedHead):
    """Scores W f + b, W in R^{C x L}; cross entropy over the current task's classes, or over all classes seen.

    During a task only the rows of the classes in the loss are parameters; all other rows are plain buffers, so that no
    optimizer, weight decay or momentum can touch them. A new class starts from N(0, 0.02^2) drawn from (seed, label
    text), whatever the order of tasks; a class that reappears goes on from its row. A task of one class trains its row
    alone, in a loss over all classes seen: the other rows stand in it as constants.

    Each finished task leaves a copy of its own rows: `scores(features, task=j)` reads them, the task-incremental view.

    Args:
        loss: "current" (the classes of the task alone) or "seen" (all classes so far).

    Raises:
        ConfigError: another loss.
    """

    name = "linear"
    weighs = True
    class_axis: ClassVar[Mapping[str, int]] = {"seen": 0, "weight": 0, "bias": 0}
    task_parts = "tasks."
    weight: Tensor  # W, (C, L)
    bias: Tensor  # b, (C,)
    active_weight: nn.Parameter  # (classes in training, L); None outside of a task
    active_bias: nn.Parameter  # (classes in training,)

    def __init__(self, loss: Classes = "current") -> None:
        super().__init__(loss)
        if loss == "seen":
            self.name = "linear_seen"
        self._drop_parameters()

    def open(self, width: int, labels: Sequence[str], *, seed: int, label_embeddings: Tensor | None = None) -> None:
        super().open(width, labels, seed=seed)
        self.register_buffer("weight", torch.stack([new_row(width, label, seed) for label in labels]))
        self.register_buffer("bias", torch.zeros(len(labels)))
        self._drop_parameters()
        # Of each finished task: its classes (k,), their rows (k x L) and biases (k,) when it ended.
        self.tasks: list[tuple[Tensor, Tensor, Tensor]] = []
        self._moved: float | None = None

    def reopen(self, task: int) -> None:
        own, weight, bias = self.tasks[task]
        self.weight[own], self.bias[own] = weight.to(self.weight), bias.to(self.bias)

    def begin_task(self, classes: Sequence[int]) -> None:
        super().begin_task(classes)
        self.active_weight = nn.Parameter(self.weight[self.in_training].clone())
        self.active_bias = nn.Parameter(self.bias[self.in_training].clone())
        self._before = self.weight.clone(), self.bias.clone()

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        self.check_features(features)
        self._check_begun()
        return self.cross_entropy(F.linear(features.to(self.weight.dtype), *self._rows_in_loss()), labels)

    def _rows_in_loss(self) -> tuple[Tensor, Tensor]:
        """Rows (k x L) and biases (k,) of the k classes in the loss; those that are not trained are constants."""
        if self.in_training == self.in_loss:
            return self.active_weight, self.active_bias
        place = torch.tensor([self.in_loss.index(c) for c in self.in_training], device=self.weight.device)
        weight, bias = self.weight[self.in_loss], self.bias[self.in_loss]
        return weight.index_copy(0, place, self.active_weight), bias.index_copy(0, place, self.active_bias)

    @torch.no_grad()
    def end_task(self) -> None:
        own, rows = torch.tensor(self.task_classes), self.in_training
        super().end_task()
        self.weight[rows], self.bias[rows] = self.active_weight, self.active_bias
        self._drop_parameters()
        self.tasks.append((own, self.weight[own].clone(), self.bias[own].clone()))
        others = [c for c in range(len(self.labels)) if c not in set(rows)]
        weight, bias = self._before
        moved = [(self.weight - weight)[others].abs(), (self.bias - bias)[others].abs()]
        self._moved = max(float(m.max()) for m in moved) if others else None
        del self._before

    @torch.no_grad()
    def scores(self, features: Tensor, task: int | None = None) -> Tensor:
        """See `Head.scores`. With `task`, the rows that the task had when it ended (during the task: its current ones).

        Raises:
            HeadError: there is no such task yet.
        """
        self.check_features(features)
        classes, weight, bias = (tensor.to(features.device) for tensor in self._rows(task))
        scores = torch.full((len(features), len(self.labels)), -torch.inf, device=features.device)
        scores[:, classes] = F.linear(features.to(weight.dtype), weight, bias).to(scores.dtype)
        return scores

    def _rows(self, task: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Classes to score (k of them), their rows (k x L) and biases (k,)."""
        if task is not None and 0 <= task < len(self.tasks):
            return self.tasks[task]
        weight, bias = self.weight, self.bias
        if self.in_loss:
            index = torch.tensor(self.in_training, device=weight.device)
            weight = weight.index_copy(0, index, self.active_weight)
            bias = bias.index_copy(0, index, self.active_bias)
        if task is None:
            classes = self.seen.nonzero().flatten()
        elif self.in_loss and task == len(self.tasks):
            classes = torch.tensor(self.task_classes)
        else:
            raise HeadError(f"head `{self.name}`: no rows of task {task}; {len(self.tasks)} tasks have ended")
        return classes, weight[classes], bias[classes]

    def _drop_parameters(self) -> None:
        self.register_parameter("active_weight", None)
        self.register_parameter("active_bias", None)

    def readout(self, classes: Sequence[int], task: int | None = None) -> Readout | None:
        known, weight, bias = self._rows(task)
        rows = [known.tolist().index(c) for c in self.checked_classes(classes)]
        return Readout(weight[rows].clone(), bias[rows].clone(), normalised=False)

    def knows(self, classes: Sequence[int]) -> bool:
        return bool(self.seen[self.checked_classes(classes)].all())

    def forget(self, task: int, classes: Sequence[int], before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
        """See `Head.forget`: rows that only this task had are new rows again."""
        super().forget(task, classes, before, after)
        for c in classes:
            self.weight[c], self.bias[c] = new_row(self.width, self.labels[c], self.seed), 0.0
        del self.tasks[task]

    def state(self) -> dict[str, Tensor]:
        """A row that was never in a loss is not saved: it follows from seed and label text."""
        return self.recent_state(0)

    @property
    def finished(self) -> int:
        return len(self.tasks)

    def recent_state(self, task: int) -> dict[str, Tensor]:
        state = super().state()
        kept = self.seen.nonzero().flatten()
        state |= {"weight": self.weight.cpu()[kept], "bias": self.bias.cpu()[kept]}
        place = torch.full((len(self.labels),), -1, dtype=torch.long)
        place[kept] = torch.arange(len(kept))
        for j, (own, weight, bias) in enumerate(self.tasks[task:], start=task):
            state[f"tasks.{j}.classes"] = place[own.cpu()]
            state |= {f"tasks.{j}.weight": weight.cpu().clone(), f"tasks.{j}.bias": bias.cpu().clone()}
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        columns = self.columns(state)
        weight = self.take(state, "weight", (len(columns), self.width))
        bias = self.take(state, "bias", (len(columns),))
        tasks: list[tuple[Tensor, Tensor, Tensor]] = []
        while f"tasks.{len(tasks)}.classes" in state:
            name = f"tasks.{len(tasks)}"
            own = columns[self.take(state, f"{name}.classes", None)]
            rows = self.take(state, f"{name}.weight", (len(own), self.width))
            tasks.append((own, rows.clone(), self.take(state, f"{name}.bias", (len(own),)).clone()))
        super().load_state(state)
        self.weight[columns.to(self.weight.device)] = weight.to(self.weight)
        self.bias[columns.to(self.bias.device)] = bias.to(self.bias)
        self.tasks, self._moved = tasks, None

    def guarantee(self) -> list[Measurement]:
        if self._moved is None:
            return []
        note = "Rows of classes that are not in the loss are no parameters: training leaves them as they were."
        return [Measurement("change of rows outside the loss", self._moved, 0.0, "", type(self).__name__, note)]


def new_row(width: int, label: str, seed: int) -> Tensor:
    """The first weights of a class, (L,): from its label text and the seed alone."""
    digest = hashlib.sha256(f"{seed}:{label}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randn(width, generator=generator) * SPREAD
