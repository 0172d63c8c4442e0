"""One adapter for every task, and beside them one that is merged of all, for what none of them is sure of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..core.errors import ConfigError, nearest
from ..deltas.combination import Chunk, ElectLargest
from ..heads import Head
from ..models.backbone import Backbone
from ..tuners import Tuner
from .adapters import AdapterPerTask
from .base import Session
from .states import Reading

Asked = Literal["together", "instead"]
Start = Literal["previous", "shared"]


@dataclass
class SharedBranch(AdapterPerTask):
    """With p_t(c | x) the softmax of the head's scores of all classes under adapter t, p_0 under the merged adapter,

        t* = argmin_t H(p_t(. | x)),  H(p) = -sum_c p_c log p_c,    p(c | x) = (p_t*(c | x) + p_0(c | x)) / 2.

    The merged adapter is made of the adapters' own tensors v_t, entry by entry (`ElectLargest`): the sign with the
    larger total, and the largest magnitude that has it. It is made anew after every task, from all adapters. An input
    takes a pass under every adapter and one under the merged one. A task's own adapter does not change any more; what
    is predicted under the merged one does, and nothing is promised of it.

    Source: Wang et al., Integrating Task-Specific and Universal Adapters for Pre-Trained Model-based Class-Incremental
    Learning (TUNA), 2508.08165.

    Args:
        asked: where the chosen adapter is not sure, the merged one is asked "together" with it, as published, or
            "instead" of it.
        unsure: from which entropy on, as a share of that of an even guess among the classes seen; 0 asks always, as
            published.
        start: an adapter starts from that of the task before ("previous", as the released code has it), or all start
            alike ("shared"), so that each is made without the others and a task can be taken out. Entries of adapters
            that started apart could not be compared.

    Raises:
        ConfigError: a setting out of range; (from `open`) a model that gives no features.
    """

    asked: Asked = "together"
    unsure: float = 0.0
    start: Start = "previous"
    _merged: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _of: int = field(default=0, init=False, repr=False, compare=False)  # how many adapters `_merged` is made of

    def __post_init__(self) -> None:
        for name, value, known in (("asked", self.asked, ("together", "instead")), ("start", self.start, STARTS)):
            if value not in known:
                raise ConfigError(f"SharedBranch: {name} is no `{value}`: {nearest(value, known)}")
        if not 0 <= self.unsure <= 1:
            raise ConfigError(f"SharedBranch: unsure={self.unsure}: a share of the largest entropy, from 0 to 1")

    def open(self, backbone: Backbone, tuner: Tuner, labels: Sequence[str] = ()) -> None:
        if "features" not in backbone.offers:
            raise ConfigError(
                "SharedBranch compares predictions of all classes under every adapter, and a language model reads "
                "those of one task: use PerTask"
            )
        super().open(backbone, tuner, labels)
        self._merged, self._of = {}, 0

    # ---- learning ----

    def begin_task(self, session: Session | None) -> None:
        if self.start == "shared":
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
                torch.manual_seed(0)
                super().begin_task(session)
            return
        super().begin_task(session)
        if session is not None and self._adapters and self.goes_on_from(session) is None:
            self._activate(len(self._adapters) - 1)
            self._active = None  # it is trained from here on

    @property
    def independent(self) -> bool:
        return self.start == "shared"

    def _live(self) -> list[int]:
        """The tasks whose adapters were not taken up by a later one."""
        return [t for t in range(len(self._adapters)) if t not in self._reopened]

    # ---- predicting ----

    def task_classes(self, task: int) -> tuple[int, ...]:
        return (
            super().task_classes(task) if task >= 0 else tuple(dict.fromkeys(c for own in self._classes for c in own))
        )

    def _values(self, task: int) -> dict[str, Tensor]:
        """-T is the merged adapter of T tasks: another one after every task, for whoever keeps what was read."""
        if task >= 0:
            return super()._values(task)
        if self._of != len(self._adapters):
            self._merged = merged_adapter([self._adapters[t] for t in self._live()])
            self._of = len(self._adapters)
        return self._merged

    def weights(self, reading: Reading, task: int | None = None) -> Tensor:
        """Every state that is still asked reads every input: log 1, (N x T)."""
        weights = torch.full((reading.count, len(self._adapters)), -torch.inf)
        weights[:, self._live()] = 0
        return weights

    def scores(self, head: Head, classes: int, reading: Reading, weights: Tensor) -> Tensor:
        """log p(c | x), (N x C), fp64; t* among the tasks that an input is shown to."""
        best = torch.full((reading.count, classes), -torch.inf, dtype=torch.float64)
        least = torch.full((reading.count,), torch.inf, dtype=torch.float64)
        for t in (weights > -torch.inf).any(0).nonzero().flatten().tolist():
            log_p = _log_p(head.scores(reading.all(t), t))
            entropy = torch.special.entr(log_p.exp()).sum(1).masked_fill(weights[:, t] == -torch.inf, torch.inf)
            surer = entropy < least
            best, least = torch.where(surer[:, None], log_p, best), torch.where(surer, entropy, least)
        even = math.log(max(2, int((best > -torch.inf).any(0).sum())))
        rows = (least >= self.unsure * even).nonzero().flatten()
        if len(rows):
            merged = _log_p(head.scores(reading.read(-len(self._adapters), rows), None))
            together = torch.logaddexp(best[rows], merged) - math.log(2)
            best[rows] = merged if self.asked == "instead" else together
        return best

    def observed(self, reading: Reading) -> Tensor:
        return reading.all(len(self._adapters) - 1)


STARTS = ("previous", "shared")


def merged_adapter(adapters: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One adapter of the tensors of all, entry by entry: see `ElectLargest`."""
    elect, found = ElectLargest(), {}
    for name, like in adapters[0].items():
        size = like.numel()
        values = (adapter[name].detach().cpu().float().reshape(-1).numpy() for adapter in adapters)
        chunks = (Chunk(np.arange(size), each) for each in values)
        found[name] = torch.from_numpy(elect(chunks, size)).reshape(like.shape).to(like)
    return found


def _log_p(scores: Tensor) -> Tensor:
    """Over classes, (n x C), fp64, on the CPU; -inf for classes without a score."""
    return scores.double().cpu().log_softmax(1)
