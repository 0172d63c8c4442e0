"""One adapter for every task; a router says which of them an input belongs to."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.errors import ConfigError
from ..core.measurement import Measurement
from ..models.backbone import Backbone
from ..routers import Router, make_router
from ..tuners import PeftTuner, Tuner, check_base_kept
from .base import Consolidation, Files, Step, StoredFiles, stored_adapter

ADAPTER, ROUTER, CLASSES = "adapter_model.safetensors", "router.safetensors", "classes.json"
BATCH = 64
Features = Literal["frozen", "first_adapted"]


@dataclass
class PerTask(Consolidation):
    """p(c | x) = sum_t p(t | x) p(c | x, t): the router gives p(t | x), adapter t and its head give p(c | x, t).

    With one candidate the sum has one term: the route is a hard choice (CoLoR). A task's adapter and what the router
    knows of it are made from its own data alone, so later tasks change neither. A task that reopens an earlier one (see
    `Task`) goes on training its adapter and takes its place; what the router knows of both is added up.

    Args:
        router: a `Router`, its name, or `{type: name, setting: value}`.
        candidates: adapters that an input may be shown to; each costs a forward pass. One where the router has seen too
            little for probabilities.
        mass: no further candidate is asked once those before it hold this much probability.
        prior: weight w of what the router itself says of the classes of a task (`ClassRouter`, `PooledRouter`):
            p(c | x, t) ~ p_adapter(c | x, t) p_router(c | x, t)^w; 0 asks the adapter alone.
        features: what the router reads: the frozen model's features, or those under the adapter of the first task
            ("first_adapted"; then the routes depend on which task came first).

    Raises:
        ConfigError: an unknown router; several candidates of a router without probabilities; a setting out of range.
    """

    branch = "fresh"
    routed = True
    router: Any = "KMeansRouter"
    candidates: int = 1
    mass: float = 0.95
    prior: float = 0.0
    features: Features = "frozen"
    _adapters: list[dict[str, Tensor]] = field(default_factory=list, init=False, repr=False, compare=False)
    _classes: list[tuple[int, ...]] = field(default_factory=list, init=False, repr=False, compare=False)
    _names: list[str] = field(default_factory=list, init=False, repr=False, compare=False)
    _reopened: list[int | None] = field(default_factory=list, init=False, repr=False, compare=False)
    _files: Files = field(default_factory=dict, init=False, repr=False, compare=False)
    _active: int | None = field(default=None, init=False, repr=False, compare=False)
    _labels: tuple[str, ...] = field(default=(), init=False, repr=False, compare=False)
    _slots: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _in_place: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.router: Router = make_router(self.router)
        if self.candidates < 1 or not 0 < self.mass <= 1:
            raise ConfigError(f"PerTask: candidates={self.candidates}, mass={self.mass}: at least 1, and in (0, 1]")
        if self.candidates > 1 and type(self.router).log_posterior is Router.log_posterior:
            kind = type(self.router).__name__
            raise ConfigError(f"PerTask: {kind} makes a hard choice: set candidates to 1, or use RidgeRouter")
        if self.prior < 0:
            raise ConfigError(f"PerTask: prior={self.prior}: a weight, 0 or more")
        if self.features not in ("frozen", "first_adapted"):
            raise ConfigError(f"PerTask: features=`{self.features}` must be frozen or first_adapted")

    def open(self, backbone: Backbone, tuner: Tuner, labels: Sequence[str] = ()) -> None:
        """
        Raises:
            ConfigError: the tuner is no peft adapter, of which a model can have many.
        """
        if not isinstance(tuner, PeftTuner):
            raise ConfigError(f"PerTask keeps an adapter for every task; {type(tuner).__name__} is none: use Continue")
        check_base_kept(tuner, "PerTask")
        super().open(backbone, tuner, labels)
        self._labels, self._adapters, self._classes, self._active = tuple(labels), [], [], None
        self._names, self._reopened = [], []
        self.router.open(backbone.pooled_width, labels, seed=0)

    # ---- learning ----

    def goes_on_from(self, step: Step) -> int | None:
        """
        Raises:
            ConfigError: the step reopens a task that is not there.
        """
        reopens = step.tasks[0].reopens
        return None if reopens is None else self._index(reopens, step.name)

    def _index(self, name: str, of: str) -> int:
        if name not in self._names:
            raise ConfigError(f"task `{of}` goes on with the adapter of `{name}`, which is not there: keep both")
        return self._names.index(name)

    def reads(self, learned_in: int, now: int) -> int:
        """See `Consolidation.reads`: the last of the steps that went on from it."""
        for later in range(learned_in + 1, now + 1):
            learned_in = later if self._reopened[later] == learned_in else learned_in
        return learned_in

    def begin_task(self, step: Step | None) -> None:
        """A new adapter, trained beside those of the tasks before, which it does not see; or an earlier one again."""
        if hasattr(self.backbone.model, "peft_config"):
            self.backbone.model = self.tuner.detach(self.backbone.model)
        self.backbone.model = self.tuner.attach(self.backbone.model)
        self._slots, self._active = {}, None
        earlier = None if step is None else self.goes_on_from(step)
        if earlier is not None:
            self._activate(earlier)
            self._active = None  # it is trained from here on

    def end_task(self, step: Step) -> None:
        task, classes = step.index, step.classes
        self._files = self.tuner.files(self.backbone.model)
        self._keep(self._files[ADAPTER], classes, step.name, self.goes_on_from(step))
        self._files[ADAPTER] = self._adapters[-1]  # not the model's own, which change with every view
        if not self.needs_task:
            rows = step.tasks[0].train
            with self.view(None):
                seen = self.backbone.pooled(self.backbone.prepare(rows), BATCH)
            self.router.observe(task, seen, torch.tensor(rows["label"]), rows["id"])
        if task in self.router.known:
            self._files[ROUTER] = self.router.task_state(task)
        own = {"classes": [self._labels[c] for c in classes], "task": step.name, "reopens": step.tasks[0].reopens}
        self._files[CLASSES] = own
        self.backbone.version += 1

    def _keep(self, adapter: dict[str, Tensor], classes: Sequence[int], name: str, reopened: int | None) -> None:
        self._adapters.append({name: t.detach().clone() for name, t in adapter.items()})
        self._classes.append(tuple(classes))
        self._names.append(name)
        self._reopened.append(reopened)
        self._active = len(self._adapters) - 1
        if reopened is not None and reopened in self.router.known:  # no input is sent to the state that it was in
            self.router.load_task_state(self._active, self.router.task_state(reopened))
            self.router.forget(reopened)

    def files(self) -> Files:
        return self._files

    def restore(self, commits: Sequence[StoredFiles]) -> None:
        if not commits:
            return
        self.begin_task(None)
        for task, commit in enumerate(commits):
            own = commit.json(CLASSES)
            name, reopens = own.get("task", ""), own.get("reopens")
            classes = [self._labels.index(label) for label in own["classes"]]
            earlier = None if reopens is None else self._index(reopens, name)
            self._keep(stored_adapter(commit), classes, name, earlier)
            if commit.has(ROUTER):
                self.router.load_task_state(task, commit.tensors(ROUTER))
        self._active = None
        self.backbone.version = len(commits)

    def compose(self, commits: Mapping[str, StoredFiles], scales: Mapping[str, float]) -> None:
        """See `Consolidation.compose`: one task alone, with its adapter as it is.

        Raises:
            ConfigError: another choice, which no single model could be.
        """
        if len(scales) > 1 or set(scales.values()) != {1.0}:
            raise ConfigError(
                "there is one adapter for every task and no model that holds several: export one task (--only TASK)"
            )
        self.begin_task(None)
        self.tuner.load(self.backbone.model, stored_adapter(commits[next(iter(scales))]))

    def separable(self, tuner: Tuner) -> bool:
        return self.independent

    @property
    def independent(self) -> bool:
        return self.features == "frozen"

    # ---- predicting ----

    def task_classes(self, task: int) -> tuple[int, ...]:
        return self._classes[task]

    @contextlib.contextmanager
    def view(self, task: int | None) -> Iterator[None]:
        """The model with the adapter of a task; None: as the router sees it."""
        task = 0 if task is None and self.features == "first_adapted" and self._adapters else task
        if task is not None:
            self._activate(task)
            yield
        elif hasattr(self.backbone.model, "disable_adapter"):
            with self.backbone.model.disable_adapter():
                yield
        else:
            yield

    @torch.no_grad()
    def _activate(self, task: int) -> None:
        """There is one adapter in the model, whose values are exchanged: any tuner can be kept, however many."""
        if task == self._active:
            return
        if not self._slots:  # a newly attached model
            self._slots = self.tuner.tensors(self.backbone.model)
            own = {t.data_ptr() for t in (*self.backbone.model.parameters(), *self.backbone.model.buffers())}
            self._in_place = all(t.data_ptr() in own for t in self._slots.values())
        values = self._adapters[task]
        if self._in_place:
            torch._foreach_copy_([self._slots[name] for name in values], list(values.values()))
        else:
            self.tuner.load(self.backbone.model, values)
        self._active = task

    @property
    def needs_task(self) -> bool:
        return self.router.needs_task

    def candidates_of(self, features: Tensor, task: int | None = None) -> Tensor:
        """log p(task | x), (N x T), of the tasks whose adapters an input is shown to; -inf for all others.

        A hard choice has log p = 0.

        Raises:
            ConfigError: the router must be told the task, and was not.
        """
        weights = torch.full((len(features), len(self._adapters)), -torch.inf, dtype=torch.float64)
        if self.needs_task:
            if task is None:
                raise ConfigError(f"{type(self.router).__name__} does not find out the task of an input: give it")
            weights[:, task] = 0
            return weights
        if self.candidates == 1 or not self.router.calibrated:
            return weights.scatter_(1, self.router.route(features).cpu()[:, None], 0.0)
        log_p = self.router.log_posterior(features).cpu().to(weights)
        ordered, tasks = log_p.sort(dim=1, descending=True, stable=True)
        before = ordered.exp().cumsum(1) - ordered.exp()  # held by those ahead of a candidate
        asked = (before < self.mass) & (torch.arange(log_p.shape[1]) < self.candidates)
        return weights.scatter_(1, tasks, ordered.masked_fill(~asked, -torch.inf))

    def prior_of(self, features: Callable[[], Tensor], task: int) -> Tensor | None:
        log_p = self.router.log_within(features(), task) if self.prior else None
        return None if log_p is None else self.prior * log_p

    def guarantee(self) -> list[Measurement]:
        return self.router.guarantee()
