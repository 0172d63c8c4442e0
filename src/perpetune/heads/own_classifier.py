"""A linear head that goes on from the own head of a model that was fine-tuned as a classifier."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.errors import HeadError
from .linear import LinearHead


class OwnClassifierHead(LinearHead):
    """As `LinearHead`, but classes that the model's own head knows (by its `id2label`) start from its rows.

    Right after `start_from`, scores of these classes are the logits of the fine-tuned classifier.
    """

    name = "own_classifier"
    starts_from_own = True

    def open(self, width: int, labels: Sequence[str], *, seed: int, label_embeddings: Tensor | None = None) -> None:
        super().open(width, labels, seed=seed)
        self._own: dict[str, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def start_from(self, weight: Tensor, bias: Tensor, labels: Sequence[str]) -> None:
        self._own = {label: (weight[i], bias[i]) for i, label in enumerate(labels)}
        shared = [c for c, label in enumerate(self.labels) if label in self._own]
        if not shared:
            raise HeadError(
                f"head `{self.name}`: the model's own head knows {', '.join(labels[:5])}, and none of the classes of "
                f"this stream ({', '.join(self.labels[:5])}): relabel the stream, or use the head linear"
            )
        self._start(shared)

    def _start(self, classes: Sequence[int]) -> None:
        for c in classes:
            if self.labels[c] in self._own:
                weight, bias = self._own[self.labels[c]]
                self.weight[c], self.bias[c] = weight.to(self.weight), bias.to(self.bias)

    def forget(self, task: int, classes: Sequence[int], before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
        super().forget(task, classes, before, after)
        self._start(classes)
