"""Keep training the same weights, task after task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..core.measurement import Measurement
from .base import Consolidation, Files, Session, StoredFiles, stored_adapter


@dataclass
class Continue(Consolidation):
    """One tuner all the way: a commit holds its state after the task, and the last commit is the model."""

    adapters = "newest"
    _attached: bool = field(default=False, init=False, repr=False, compare=False)

    def begin_task(self, session: Session) -> None:
        if not self._attached:
            self.backbone.model = self.tuner.attach(self.backbone.model)
            self._attached = True

    def end_task(self, session: Session) -> None:
        if self.tuner.trains:
            self.backbone.version += 1

    def files(self) -> Files:
        return self.tuner.files(self._tuned())

    def restore(self, commits: Sequence[StoredFiles]) -> None:
        if commits:
            self.begin_task(None)  # type: ignore[arg-type]
            self.tuner.load(self._tuned(), stored_adapter(commits[-1]))
            self.backbone.version = len(commits) if self.tuner.trains else 0

    def _tuned(self) -> torch.nn.Module:
        return self.backbone.model if self.tuner.wraps_model else self.backbone

    def guarantee(self) -> list[Measurement]:
        if self.tuner.trains:
            return self.tuner.guarantee(self._tuned(), {})
        changed = float(self.backbone.weights_changed())
        note = "the weights are byte for byte those that were loaded (0), or not (1)"
        return [Measurement("change of the frozen weights", changed, 0.0, "", type(self.tuner).__name__, note)]
