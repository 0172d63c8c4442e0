"""Adapt to the first task, then freeze: everything later is learned by heads that do not train."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import datasets
import torch
from torch import Tensor

from ..core.errors import ConfigError, nearest
from ..core.measurement import Measurement
from ..heads import Head, LDAHead
from ..heads.moments import in_holdout
from ..models.backbone import Backbone, fingerprint
from ..tuners import PeftTuner, Tuner, check_base_kept
from .base import Files, Session, StoredFiles, stored_adapter
from .continue_ import Continue
from .states import PerTaskStates, Reading

FACTS = "first_task.json"
BATCH = 64
SHRINKAGE = 0.1  # of the discriminant analysis that judges features


@dataclass
class FirstTask(Continue, PerTaskStates):
    """The first task trains the tuner; from then on the model is frozen, and statistics never grow stale.

    With `ridge` it is RanPAC (McDonnell et al., 2307.02251), with `ncm` and `concatenate` it is APER (Zhou et al.,
    2303.07338). What can be learned depends on which task is first; what comes after it does not depend on the order.

    keep="better"   a share of the first task's training rows, by a hash of their ids, is held out of training; the
                    adapter stays only if discriminant analysis of the other rows' features names more of those classes
                    right with it than without. Ours: on some streams the adapted features are worse.
    concatenate     heads read f(x) = [f_0(x), f_1(x)] in R^{2 L}, without and with the adapter. Every input takes two
                    passes. For heads that do not train.

    Args:
        keep: "always", as published, or "better".
        concatenate: see above.
        holdout: share of the first task's rows that judge.

    Raises:
        ConfigError: a setting out of range; (from `open`) a tuner that cannot be switched off where it must be, or a
            model without features.
    """

    keep: Literal["always", "better"] = "always"
    concatenate: bool = False
    holdout: float = 0.2
    _settled: bool = field(default=False, init=False, repr=False, compare=False)
    _facts: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    _files: Files = field(default_factory=dict, init=False, repr=False, compare=False)
    _print: str = field(default="", init=False, repr=False, compare=False)
    _classes: tuple[int, ...] = field(default=(), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.keep not in ("always", "better"):
            raise ConfigError(f"FirstTask: keep={self.keep!r}; {nearest(self.keep, ('always', 'better'))}")
        if not 0 < self.holdout < 1:
            raise ConfigError(f"FirstTask: holdout={self.holdout}; give a share between 0 and 1")

    def open(self, backbone: Backbone, tuner: Tuner, labels: Sequence[str] = ()) -> None:
        if self.keep == "better" or self.concatenate:
            if "features" not in backbone.offers:
                raise ConfigError("FirstTask compares features, and a language model has answers: use keep=always")
            if not isinstance(tuner, PeftTuner):
                name = type(tuner).__name__
                raise ConfigError(f"FirstTask reads the model without its adapter too; {name} is none: use keep=always")
            check_base_kept(tuner, "FirstTask")
        super().open(backbone, tuner, labels)
        self._classes = tuple(range(len(labels)))
        self._settled = False

    # ---- learning ----

    def adapts(self, session: Session) -> bool:
        return not self._settled

    def rows(self, session: Session) -> datasets.Dataset:
        rows = super().rows(session)
        if self._settled or self.keep == "always":
            return rows
        return rows.select(self._fold(rows)[0])

    def _fold(self, rows: datasets.Dataset) -> tuple[list[int], list[int]]:
        """Indices of the rows to train on and of those held out; all of them for both where one would be empty."""
        held = [in_holdout(i, self.holdout) for i in rows["id"][:]]
        train, out = ([k for k, is_out in enumerate(held) if is_out is which] for which in (False, True))
        return (train, out) if train and out else (list(range(len(rows))), list(range(len(rows))))

    def begin_task(self, session: Session) -> None:
        if not self._settled:
            super().begin_task(session)

    def end_task(self, session: Session) -> None:
        self._files = {FACTS: self._facts}
        if self._settled:
            return
        super().end_task(session)
        self._files = self.tuner.files(self._tuned())
        self._facts = {"kept": True}
        if self.keep == "better":
            self._facts = self._judged(session.tasks[0].train)
            if not self._facts["kept"]:
                self.backbone.model = self.tuner.detach(self.backbone.model)
                self._files = {}
        self._files[FACTS] = self._facts
        self._settle()

    def _judged(self, rows: datasets.Dataset) -> dict[str, Any]:
        train, out = (rows.select(fold) for fold in self._fold(rows))
        accuracy = {}
        for name, task in (("frozen", None), ("adapted", 0)):
            with self.view(task):
                f, g = (self.backbone.features(self.backbone.prepare(part), BATCH) for part in (train, out))
            head = LDAHead(shrinkage=SHRINKAGE)
            head.open(f.shape[1], [str(c) for c in self._classes], seed=0)
            head.observe(f, torch.tensor(train["label"][:]), train["id"][:])
            right = head.scores(g).argmax(1).cpu() == torch.tensor(out["label"][:])
            accuracy[name] = float(right.double().mean())
        return {"kept": accuracy["adapted"] > accuracy["frozen"], **accuracy}

    def _settle(self) -> None:
        for parameter in self.backbone.model.parameters():
            parameter.requires_grad_(False)
        self._settled = True
        self._print = fingerprint(self.backbone.model)

    def files(self) -> Files:
        return self._files

    def restore(self, commits: Sequence[StoredFiles]) -> None:
        if commits:
            self._facts = commits[0].json(FACTS)
            if self._facts["kept"]:
                self.begin_task(None)  # type: ignore[arg-type]
                self.tuner.load(self._tuned(), stored_adapter(commits[0]))
            self.backbone.version = 1
            self._settle()

    # ---- predicting ----

    @property
    def states(self) -> PerTaskStates | None:
        return self if self.concatenate else None

    def reads(self, learned_in: int, now: int) -> int:
        return 0 if self.concatenate else learned_in

    def read_width(self, width: int) -> int:
        return 2 * width

    def task_classes(self, task: int) -> tuple[int, ...]:
        return self._classes

    def goes_on_from(self, session: Session) -> int | None:
        return None

    @contextlib.contextmanager
    def view(self, task: int | None) -> Iterator[None]:
        """The model as it is; None: without the adapter."""
        if task is None and hasattr(self.backbone.model, "disable_adapter"):
            with self.backbone.model.disable_adapter():
                yield
        else:
            yield

    def weights(self, reading: Reading, task: int | None = None) -> Tensor:
        """There is one state, log 1, (N x 1)."""
        return torch.zeros(reading.count, 1)

    def scores(self, head: Head, classes: int, reading: Reading, weights: Tensor) -> Tensor:
        return head.scores(self.observed(reading))

    def observed(self, reading: Reading) -> Tensor:
        """(N x 2 L)."""
        return torch.cat([reading.all(None), reading.all(0)], 1)

    def guarantee(self) -> list[Measurement]:
        changed = float(fingerprint(self.backbone.model) != self._print)
        note = "From the end of the first task on the weights are byte for byte the same (0), or not (1)."
        measured = [Measurement("change of the settled weights", changed, 0.0, "", "FirstTask", note)]
        for name in ("frozen", "adapted"):
            if name in self._facts:
                note = "Of the first task's held-out rows; the adapter is kept if it is better."
                title = f"held-out accuracy, {name} features"
                measured.append(Measurement(title, self._facts[name], None, "", "FirstTask", note))
        return measured
