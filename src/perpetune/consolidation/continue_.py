"""Keep training the same weights, task after task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..core.measurement import Measurement
from ..tuners import AllWeights
from .base import Consolidation, Files, Session, StoredFiles, stored_adapter
from .changed_weights import FILE, BaseWeights


@dataclass
class Continue(Consolidation):
    """One tuner all the way: a commit holds its state after the task, and the last commit is the model. Of a model that
    is trained whole, it holds the entries that are not those of the base."""

    adapters = "newest"
    _attached: bool = field(default=False, init=False, repr=False, compare=False)
    _base: BaseWeights | None = field(default=None, init=False, repr=False, compare=False)
    _whole: bool = field(default=False, init=False, repr=False, compare=False)  # commits as earlier versions wrote them

    def begin_task(self, session: Session) -> None:
        if not self._attached:
            if isinstance(self.tuner, AllWeights) and not self._whole:
                self._base = BaseWeights(self.backbone.model)
            self.backbone.model = self.tuner.attach(self.backbone.model)
            self._attached = True

    def end_task(self, session: Session) -> None:
        if self.tuner.trains:
            self.backbone.version += 1

    def files(self) -> Files:
        return self.tuner.files(self._tuned()) if self._base is None else {FILE: self._base.changed(self._tuned())}

    def restore(self, commits: Sequence[StoredFiles]) -> None:
        if commits:
            self._whole = not commits[-1].has(FILE)
            self.begin_task(None)  # type: ignore[arg-type]
            if self._base is not None:
                self._base.load(self._tuned(), commits[-1].tensors(FILE))
            else:
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
