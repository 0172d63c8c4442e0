"""An adapter for every task, which counts beside the frozen model as much as held-out examples show that it helps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.errors import ConfigError
from ..core.measurement import Measurement
from ..heads import Head
from ..heads.moments import in_holdout
from ..heads.ridge import FEWEST
from ..models.backbone import Backbone
from ..routers import LDARouter
from ..routers.classes import over_classes
from ..tuners import Tuner
from .base import Session, StoredFiles
from .per_task import BATCH, PerTask
from .states import Reading

VOTES = "held_out.json"
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
UNKNOWN = 0.5  # the weight where no task has held-out examples enough


@dataclass
class WeighedPerTask(PerTask):
    """p(c | x) = sum_t p_f(t | x) q_t(c | x), with p_f of the frozen model, over all classes of all tasks, and

        q_t ~ p_f(c | x, t)^(1 - w) p_adapter(c | x, t)^w   for the tasks that the input is shown to
        q_t = p_f(c | x, t)                                 for all others.

    At w = 0 this is p_f(c | x), and no adapter is asked; at w = 1 the frozen model routes alone. w, one for all tasks,
    is the one of {0, 1/4, 1/2, 3/4, 1} with the least log-loss of q_t on held-out examples of each task, added up over
    tasks (of equals, the smallest). A share of a task's training rows, by a hash of their ids, is held out of the
    training of its adapter; when the task is learned they are predicted by it, and by the frozen model as fitted to the
    rest of this task alone, and what is kept of them are these five sums. So they depend neither on other tasks nor on
    their order, and go when a task is taken out. Router and heads that gather have the sums of all rows.

    Where every class is one of several tasks (new domains) there is nothing to find out but the task, and where the
    router has too few examples for probabilities it has none to multiply: the routed adapters decide alone. Language
    models, whose answers no features predict, are read as under `PerTask`, with `prior`, and train on all rows.

    Args:
        holdout: share of the rows that are held out of the training of adapters, at most that of the router, within
            which they lie. A task of which it leaves fewer than 10, or a class without a row to train on, trains on all
            rows and has no say in w; nor has any under a head of sums, which have those of all rows.

    Raises:
        ConfigError: a setting out of range; a router that is no `LDARouter`.
    """

    router: Any = "LDARouter"
    candidates: int = 3
    prior: float = 0.5
    holdout: float = 0.1
    _votes: dict[int, dict[str, Any]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.router, LDARouter) or self.features != "frozen" or self.frozen:
            raise ConfigError("WeighedPerTask weighs adapters against what an LDARouter predicts of frozen features")
        if not 0 < self.holdout <= self.router.holdout:
            most = f"at most {self.router.holdout}, that of the router"
            raise ConfigError(f"WeighedPerTask: holdout={self.holdout}; above 0, and {most}")

    def open(self, backbone: Backbone, tuner: Tuner, labels: Sequence[str] = ()) -> None:
        super().open(backbone, tuner, labels)
        self._votes = {}

    # ---- learning ----

    @property
    def _weighs(self) -> bool:
        """Whether features predict what is predicted."""
        return "answers" not in self.backbone.offers

    def rows(self, session: Session) -> datasets.Dataset:
        rows = super().rows(session)
        held = set(self._held(rows))
        return rows.select([k for k in range(len(rows)) if k not in held]) if held else rows

    def _held(self, rows: datasets.Dataset) -> list[int]:
        """Indices of the rows that are held out."""
        if not self._weighs:
            return []
        held = [k for k, i in enumerate(rows["id"][:]) if in_holdout(i, self.holdout)]
        labels = rows["label"][:]
        left = Counter(labels) - Counter(labels[k] for k in held)
        return held if len(held) >= FEWEST and left.keys() == set(labels) else []

    def judge(self, session: Session, head: Head) -> None:
        rows = super().rows(session)
        held, task = self._held(rows), len(self._adapters) - 1
        if not held or head.reads != "features" or head.follows_texts or head.observes:
            return
        examples, own = self.backbone.prepare(rows.select(held)), torch.tensor(self.task_classes(task))
        assert isinstance(self.router, LDARouter)
        with self.view(None):
            log_q = self.router.alone(self.backbone.pooled(examples, BATCH), task)[:, own]
        with self.view(task):
            scores = head.scores(self.backbone.features(examples, BATCH), task)[:, own]
        found = torch.tensor([rows["label"][k] for k in held])
        right = (own[None] == found[:, None]).double().argmax(1)[:, None]
        log_p = scores.double().cpu().log_softmax(1)
        losses = [-float(_mixed(log_q, log_p, w).gather(1, right).sum()) for w in WEIGHTS]
        self._votes[task] = {"samples": len(held), "losses": losses}
        self._files[VOTES] = self._votes[task]

    def _keep(self, adapter: dict[str, Tensor], classes: Sequence[int], name: str, reopened: int | None) -> None:
        super()._keep(adapter, classes, name, reopened)
        if reopened is not None:  # its adapter is not asked any more
            self._votes.pop(reopened, None)

    def _restore_task(self, task: int, commit: StoredFiles) -> None:
        super()._restore_task(task, commit)
        if commit.has(VOTES):
            self._votes[task] = commit.json(VOTES)

    # ---- predicting ----

    @property
    def weight(self) -> float:
        """w."""
        if not self._votes:
            return UNKNOWN
        totals = [sum(vote["losses"][k] for vote in self._votes.values()) for k in range(len(WEIGHTS))]
        return WEIGHTS[totals.index(min(totals))]

    def _mixes(self) -> bool:
        shared = Counter(c for task in self.router.tasks for c in self._classes[task])
        return self._weighs and 1 in shared.values() and self.router.calibrated

    def _opinions(self) -> tuple[float, float]:
        return (0.0 if self._weighs else self.prior), 0.0

    def _log_joint(self, reading: Reading) -> tuple[Tensor, Tensor, Tensor]:
        assert isinstance(self.router, LDARouter)
        return reading.once("joint", partial(self.router.log_joint, reading.all(None)))

    def _log_posterior(self, reading: Reading) -> Tensor:
        return over_classes(*self._log_joint(reading)[:2])

    def scores(self, head: Head, classes: int, reading: Reading, weights: Tensor) -> Tensor:
        """log p(c | x), (N x C), fp64; tasks that `weights` leaves out share what probability it leaves."""
        if not self._mixes():
            return super().scores(head, classes, reading, weights)
        (joint, task_of, class_of), w = self._log_joint(reading), self.weight
        log_t = over_classes(joint, task_of)
        weights = F.pad(weights.double().cpu(), (0, log_t.shape[1] - weights.shape[1]), value=-torch.inf)
        shown = weights > -torch.inf
        log_t = log_t.masked_fill(shown, -torch.inf)
        left = torch.log1p(-weights.exp().sum(1).clamp(max=1))
        log_t = torch.where(shown, weights, log_t.log_softmax(1).nan_to_num(nan=-torch.inf) + left[:, None])
        scores = torch.full((reading.count, classes), -torch.inf, dtype=torch.float64)
        for t in (log_t > -torch.inf).any(0).nonzero().flatten().tolist():
            own, mine = torch.tensor(self.task_classes(t)), task_of == t
            within = joint.new_full((reading.count, len(own)), -torch.inf)
            within[:, (class_of[mine][:, None] == own).int().argmax(1)] = joint[:, mine]
            log_q, rows = within.log_softmax(1), shown[:, t].nonzero().flatten()
            if w and len(rows):
                log_p = head.scores(reading.read(t, rows), t)[:, own].double().cpu().log_softmax(1)
                log_q[rows] = _mixed(log_q[rows], log_p, w)
            scores[:, own] = torch.logaddexp(scores[:, own], log_t[:, [t]] + log_q)
        return scores

    # ---- what is told ----

    def guarantee(self) -> list[Measurement]:
        samples = sum(vote["samples"] for vote in self._votes.values())
        note = f"Beside the frozen model, chosen on {samples} held-out examples of all tasks so far."
        return [
            *super().guarantee(),
            Measurement("weight of the adapters", self.weight, None, "", "WeighedPerTask", note),
        ]

    def decision(self) -> str | None:
        if not self._adapters:
            return None
        if not self._weighs:
            return "routed adapters, since no features predict what a language model answers"
        if not self._mixes():
            alike = self.router.calibrated
            why = "all tasks have the same classes" if alike else "there are too few examples to weigh them"
            return f"routed adapters alone, since {why}"
        samples = sum(vote["samples"] for vote in self._votes.values())
        on = f"the best on {samples} held-out examples" if samples else "no examples could be held out to choose"
        if not self.weight:
            return f"the frozen model alone: adapters did not help ({on})"
        return f"the frozen model and each task's adapter, which counts {self.weight:.0%}: {on}"


def _mixed(log_q: Tensor, log_p: Tensor, w: float) -> Tensor:
    """log of q^(1 - w) p^w over the classes of a task, (n x k)."""
    if w in (0.0, 1.0):
        return log_p if w else log_q
    return ((1 - w) * log_q + w * log_p).log_softmax(1)
