"""Heads with a loss: which classes it runs over, and which classes were seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.errors import ConfigError, HeadError, nearest
from .base import Head
from .stateful import OpenedHead

Classes = Literal["current", "seen"]


class TrainedHead(OpenedHead):
    """A head whose cross entropy runs over the current task's classes ("current") or over all seen so far ("seen").

    A task of one class is told from all classes seen so far, which themselves are not trained: among the current
    classes alone there would be nothing to choose.

    `loss_over` holds the constructor's `loss`, as `loss` is the method. Between `begin_task` and `end_task`, `in_loss`
    lists the classes of the loss, and `in_training` those of them whose rows it trains; outside of a task both are
    empty.
    """

    trains = True
    class_axis: ClassVar[Mapping[str, int]] = {"seen": 0}
    contrasts = True  # whether the loss is a choice among classes, and nothing is left of it with one

    def __init__(self, loss: Classes) -> None:
        super().__init__()
        if loss not in ("current", "seen"):
            raise ConfigError(f"{type(self).__name__}: loss={loss!r}; {nearest(str(loss), ('current', 'seen'))}")
        self.loss_over: Classes = loss
        self.in_loss: list[int] = []
        self.in_training: list[int] = []
        self.task_classes: list[int] = []
        self.weights: Tensor | None = None

    def config(self) -> dict[str, Any]:
        return {name: self.loss_over if name == "loss" else value for name, value in super().config().items()}

    def open(self, width: int, labels: Sequence[str], *, seed: int, label_embeddings: Tensor | None = None) -> None:
        super().open(width, labels, seed=seed)
        self.seen = torch.zeros(len(labels), dtype=torch.bool)
        self.in_loss, self.in_training, self.task_classes = [], [], []

    def trainer(self) -> Head:
        return self

    def begin_task(self, classes: Sequence[int]) -> None:
        """See `Head.begin_task`.

        Raises:
            HeadError: the last task has not ended, or a class is unknown.
        """
        classes = self.checked_classes(classes)
        if self.in_loss:
            raise HeadError(f"head `{self.name}`: a task has begun already; call `end_task` first")
        self.seen[classes] = True
        self.task_classes = classes
        seen = self.seen.nonzero().flatten().tolist()
        single = self.contrasts and self.loss_over == "current" and len(classes) == 1
        self.in_loss = seen if single or self.loss_over == "seen" else classes
        self.in_training = classes if single else self.in_loss
        self._position = torch.full((len(self.labels),), -1, dtype=torch.long)
        self._position[self.in_loss] = torch.arange(len(self.in_loss))

    def end_task(self) -> None:
        self._check_begun()
        self.in_loss, self.in_training, self.task_classes, self.weights = [], [], [], None

    def weigh(self, weights: Tensor) -> None:
        self._check_begun()
        self.weights = weights

    def cross_entropy(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Mean over the batch of w_y (-log softmax_y), y the true class, w the weights of classes: 1 without `weigh`.

        The sum is divided by the size of the batch and not by the sum of its weights, so that a batch without a rare
        class does not weigh the others more.

        Args:
            scores: of the k classes in the loss, (N x k); labels: global class indices, (N,).
        """
        targets = self.targets(labels)
        if self.weights is None:
            return F.cross_entropy(scores, targets)
        if self.weights.device != labels.device:
            self.weights = self.weights.to(labels.device)
        return (self.weights[labels] * F.cross_entropy(scores, targets, reduction="none")).mean()

    def targets(self, labels: Tensor) -> Tensor:
        """Global class indices (N,) as positions in `in_loss`.

        Raises:
            HeadError: no task has begun, or a label is not in the loss.
        """
        self._check_begun()
        if self._position.device != labels.device:
            self._position = self._position.to(labels.device)
        targets = self._position[labels]
        # on an accelerator the check would make every step wait; the training data is checked before training there
        if labels.device.type == "cpu" and (targets < 0).any():
            label = self.labels[int(labels[targets < 0][0])]
            raise HeadError(f"head `{self.name}`: class `{label}` is not a class of the current loss")
        return targets

    def forget(self, task: int, classes: Sequence[int], before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
        """See `Head.forget`: the classes are as if never seen."""
        self._check_rest("made to forget")
        self.seen[list(classes)] = False

    def state(self) -> dict[str, Tensor]:
        self._check_rest("saved")
        kept = self.seen.nonzero().flatten()
        return {**self.header(kept), "seen": self.seen[kept]}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._check_rest("loaded")
        columns = self.columns(state)
        seen = torch.zeros_like(self.seen)
        seen[columns] = self.take(state, "seen", (len(columns),)).bool()
        self.seen = seen

    def _check_begun(self) -> None:
        if not self.in_loss:
            raise HeadError(f"head `{self.name}`: no task has begun; call `begin_task(classes)` first")

    def _check_rest(self, what: str) -> None:
        if self.in_loss:
            raise HeadError(f"head `{self.name}` cannot be {what} in the middle of a task; call `end_task` first")
