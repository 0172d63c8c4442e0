"""One adapter for every task; a router finds out which of them an input belongs to."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.errors import ConfigError
from ..core.measurement import Measurement
from ..heads import Head
from ..models.backbone import Backbone
from ..models.layers import read_layers
from ..models.views import check_views, read_views
from ..routers import Router, make_router
from ..tuners import Tuner
from .adapters import AdapterPerTask
from .base import Session, StoredFiles
from .states import Reading

ROUTER = "router.safetensors"
FREE_TEXT = "\0free text"  # what routers take all free texts of a task for: one class
BATCH = 64
Features = Literal["frozen", "first_adapted"]


@dataclass
class PerTask(AdapterPerTask):
    """p(c | x) = sum_t p(t | x) p(c | x, t): the router gives p(t | x), adapter t and its head give p(c | x, t).

    With one candidate the sum has one term: the route is a hard choice (CoLoR). A task's adapter and what the router
    knows of it are made from its own data alone, so later tasks change neither. What the router knows of a task that is
    reopened is added up.

    Args:
        router: a `Router`, its name, or `{type: name, setting: value}`.
        candidates: adapters that an input may be shown to; each costs a forward pass. One where the router has seen too
            little for probabilities.
        mass: no further candidate is tried once those before it hold this much probability.
        prior: weight w of what the router itself predicts among the classes of a task (`ClassRouter`, `PooledRouter`):
            p(c | x, t) ~ p_adapter(c | x, t) p_router(c | x, t)^w; 0 takes the adapter alone.
        frozen: weight v of what the router predicts among the classes of all tasks (`Router.log_classes`), a product
            of experts over the tasks tried: p(c | x) ~ (sum_t p(t | x) p_adapter(c | x, t)) p_router(c | x)^v. It takes
            the place of `prior`; 0 leaves it out. Where every class is one of several tasks (new domains), there is
            nothing to route for, and the adapters alone decide. Language models, whose answers no features predict,
            keep to `prior`.
        features: what the router reads: the frozen model's features, or those under the adapter of the first task
            ("first_adapted"; then the routes depend on which task came first).
        layers: of how many last layers of an encoder the router reads the features, side by side (`read_layers`).
        views: how many views of every picture it reads beside the picture itself, 0, 4 or 8 (`read_views`); each costs
            a pass of the model, in training and in prediction.

    Raises:
        ConfigError: an unknown router; several candidates of a router without probabilities; a setting out of range.
    """

    routes = True
    router: Any = "KMeansRouter"
    candidates: int = 1
    mass: float = 0.95
    prior: float = 0.0
    features: Features = "frozen"
    frozen: float = field(default=0.0, metadata={"unwritten": 0.0})
    layers: int = field(default=1, metadata={"unwritten": 1})
    views: int = field(default=0, kw_only=True, metadata={"unwritten": 0})

    def __post_init__(self) -> None:
        self.router: Router = make_router(self.router)
        if self.candidates < 1 or not 0 < self.mass <= 1:
            raise ConfigError(f"PerTask: candidates={self.candidates}, mass={self.mass}: at least 1, and in (0, 1]")
        if self.candidates > 1 and type(self.router).log_posterior is Router.log_posterior:
            kind = type(self.router).__name__
            raise ConfigError(f"PerTask: {kind} makes a hard choice: set candidates to 1, or use RidgeRouter")
        if self.layers < 1:
            raise ConfigError(f"PerTask: layers={self.layers}: the last one (1), or more")
        check_views(self.views)
        for name, weight in (("prior", self.prior), ("frozen", self.frozen)):
            if not 0 <= weight < math.inf:
                raise ConfigError(f"PerTask: {name}={weight}: a weight, 0 or more")
        if self.features not in ("frozen", "first_adapted"):
            raise ConfigError(f"PerTask: features=`{self.features}` must be frozen or first_adapted")

    def open(self, backbone: Backbone, tuner: Tuner, labels: Sequence[str] = ()) -> None:
        super().open(backbone, tuner, labels)
        read_layers(backbone, self.layers)
        read_views(backbone, self.views)
        self.router.open(backbone.pooled_width, (*labels, FREE_TEXT), seed=0)

    # ---- learning ----

    def _learned(self, session: Session) -> None:
        if not self.needs_task:
            rows = session.tasks[0].train
            with self.view(None):
                seen = self.backbone.pooled(self.backbone.prepare(rows), BATCH)
            kinds = torch.tensor(rows["label"][:])
            self.router.observe(session.index, seen, kinds.where(kinds >= 0, len(self._labels)), rows["id"][:])
        if session.index in self.router.known:
            self._files[ROUTER] = self.router.task_state(session.index)

    def committed(self, commit: StoredFiles) -> None:
        """What the router stores of the task can be megabytes: it is read from the commit from now on."""
        super().committed(commit)
        if self._files.pop(ROUTER, None) is not None:
            self.router.hold_mapped(len(self._adapters) - 1, commit.tensors(ROUTER))

    def _keep(self, adapter: dict[str, Tensor], classes: Sequence[int], name: str, reopened: int | None) -> None:
        super()._keep(adapter, classes, name, reopened)
        if reopened is not None and reopened in self.router.known:  # no input is sent to the state that it was in
            self.router.load_task_state(len(self._adapters) - 1, self.router.task_state(reopened))
            self.router.forget(reopened)

    def _restore_task(self, task: int, commit: StoredFiles) -> None:
        if commit.has(ROUTER):
            self.router.load_task_state(task, commit.tensors(ROUTER))

    @property
    def independent(self) -> bool:
        return self.features == "frozen"

    # ---- predicting ----

    @contextlib.contextmanager
    def view(self, task: int | None) -> Iterator[None]:
        """The model with the adapter of a task; None: as the router sees it."""
        task = 0 if task is None and self.features == "first_adapted" and self._adapters else task
        with super().view(task):
            yield

    @property
    def needs_task(self) -> bool:  # type: ignore[override]
        return self.router.needs_task

    def weights(self, reading: Reading, task: int | None = None) -> Tensor:
        """See `PerTaskStates.weights`; a hard choice has log p = 0.

        Raises:
            ConfigError: the router must be given the task, and was not.
        """
        weights = torch.full((reading.count, len(self._adapters)), -torch.inf, dtype=torch.float64)
        if self.needs_task:
            if task is None:
                raise ConfigError(f"{type(self.router).__name__} does not find out the task of an input: give it")
            weights[:, task] = 0
            return weights
        features = reading.all(None)
        if self.candidates == 1 or not self.router.calibrated:
            return weights.scatter_(1, self.router.route(features).cpu()[:, None], 0.0)
        log_p = self._log_posterior(reading).cpu().to(weights)
        ordered, tasks = log_p.sort(dim=1, descending=True, stable=True)
        before = ordered.exp().cumsum(1) - ordered.exp()  # held by those ahead of a candidate
        tried = (before < self.mass) & (torch.arange(log_p.shape[1]) < self.candidates)
        return weights.scatter_(1, tasks, ordered.masked_fill(~tried, -torch.inf))

    def _log_posterior(self, reading: Reading) -> Tensor:
        return self.router.log_posterior(reading.all(None))

    def scores(self, head: Head, classes: int, reading: Reading, weights: Tensor) -> Tensor:
        """log p(c | x) = log sum_t p(t | x) p(c | x, t), (N x C), fp64: over the tasks that each input is shown to.

        One task after the other, all its inputs at once: one pass of the model for every task that is present.
        """
        scores = torch.full((reading.count, classes), -torch.inf, dtype=torch.float64)
        shown = weights > -torch.inf
        frozen = self._opinions()[1]
        for t in shown.any(0).nonzero().flatten().tolist():
            rows = shown[:, t].nonzero().flatten()
            own = torch.tensor(self.task_classes(t))
            log_p = _log_softmax(head.scores(reading.read(t, rows), t)[:, own].double().cpu())  # p(c | x, t)
            prior = self._prior(partial(reading.read, None, rows), t)
            if prior is not None:
                log_p = _log_softmax(log_p + prior[:, own].cpu())
            where = rows[:, None], own[None]
            scores[where] = torch.logaddexp(scores[where], weights[rows, t].double()[:, None] + log_p)
        log_q = self.router.log_classes(reading.all(None)) if frozen else None
        return scores if log_q is None else scores + frozen * log_q[:, :classes].cpu()

    def _opinions(self) -> tuple[float, float]:
        """The weights of what the router predicts: within a task, and among all classes. See `prior` and `frozen`."""
        if not self.frozen or "answers" in self.backbone.offers:
            return self.prior, 0.0
        tasks = Counter(c for task in self.router.tasks for c in self._classes[task])
        return 0.0, self.frozen if 1 in tasks.values() else 0.0

    def _prior(self, features: Callable[[], Tensor], task: int) -> Tensor | None:
        """w log p_router(c | x, task), (n x C); None where the adapter alone counts."""
        prior = self._opinions()[0]
        log_p = self.router.log_within(features(), task) if prior else None
        return None if log_p is None else prior * log_p

    def observed(self, reading: Reading) -> Tensor:
        return reading.all(len(self._adapters) - 1)

    def guarantee(self) -> list[Measurement]:
        return self.router.guarantee()

    def decision(self) -> str | None:
        if not self.frozen or not self._adapters:
            return None
        if "answers" in self.backbone.offers:
            return "routed adapters, since no features predict what a language model answers"
        if not self._opinions()[1]:
            return "routed adapters alone, since all tasks have the same classes: there is nothing else to find out"
        read = f"the last {self.backbone.layers} layers" if self.backbone.layers > 1 else "the last layer"
        return f"routed adapters times the frozen model ({read}), since tasks bring new classes"


def _log_softmax(scores: Tensor) -> Tensor:
    """Over classes, (n x c); -inf stays where no class has a score: a generated answer may name none of them."""
    return scores.log_softmax(1).masked_fill(scores == -torch.inf, -torch.inf)
