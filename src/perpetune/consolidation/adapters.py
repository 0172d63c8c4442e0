"""An adapter for every task, kept beside each other; one at a time is in the model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..core.errors import ConfigError
from ..models.backbone import Backbone
from ..tuners import PeftTuner, Tuner, check_base_kept
from .base import Consolidation, Files, Session, StoredFiles, stored_adapter
from .slots import Slots
from .states import PerTaskStates

ADAPTER, CLASSES = "adapter_model.safetensors", "classes.json"


@dataclass
class AdapterPerTask(Consolidation, PerTaskStates):
    """Every task trains an adapter of its own from its data alone, and keeps it: later tasks do not change it.

    A task that reopens an earlier one (see `Task`) goes on training its adapter and takes its place.
    """

    branch = "fresh"
    adapters = "each"
    _adapters: list[dict[str, Tensor]] = field(default_factory=list, init=False, repr=False, compare=False)
    _classes: list[tuple[int, ...]] = field(default_factory=list, init=False, repr=False, compare=False)
    _names: list[str] = field(default_factory=list, init=False, repr=False, compare=False)
    _reopened: list[int | None] = field(default_factory=list, init=False, repr=False, compare=False)
    _files: Files = field(default_factory=dict, init=False, repr=False, compare=False)
    _active: int | None = field(default=None, init=False, repr=False, compare=False)
    _labels: tuple[str, ...] = field(default=(), init=False, repr=False, compare=False)
    _slots: Slots | None = field(default=None, init=False, repr=False, compare=False)

    def open(self, backbone: Backbone, tuner: Tuner, labels: Sequence[str] = ()) -> None:
        """
        Raises:
            ConfigError: the tuner is no peft adapter, of which a model can have many, or its initialisation changes the
                base that they share.
        """
        if not isinstance(tuner, PeftTuner):
            name = type(self).__name__
            raise ConfigError(f"{name} keeps an adapter for every task; {type(tuner).__name__} is none: use Continue")
        check_base_kept(tuner, type(self).__name__)
        super().open(backbone, tuner, labels)
        self._labels, self._adapters, self._classes, self._active = tuple(labels), [], [], None
        self._names, self._reopened = [], []

    @property
    def states(self) -> PerTaskStates:
        return self

    # ---- learning ----

    def goes_on_from(self, session: Session) -> int | None:
        """
        Raises:
            ConfigError: the session reopens a task that is not there.
        """
        reopens = session.tasks[0].reopens
        return None if reopens is None else self._index(reopens, session.name)

    def _index(self, name: str, of: str) -> int:
        if name not in self._names:
            raise ConfigError(f"task `{of}` goes on with the adapter of `{name}`, which is not there: keep both")
        return self._names.index(name)

    def reads(self, learned_in: int, now: int) -> int:
        """See `Consolidation.reads`: the last of the sessions that went on from it."""
        for later in range(learned_in + 1, now + 1):
            learned_in = later if self._reopened[later] == learned_in else learned_in
        return learned_in

    def begin_task(self, session: Session | None) -> None:
        """A new adapter, trained beside those of the tasks before, which it does not see; or an earlier one again."""
        if hasattr(self.backbone.model, "peft_config"):
            self.backbone.model = self.tuner.detach(self.backbone.model)
        self.backbone.model = self.tuner.attach(self.backbone.model)
        self._slots, self._active = None, None
        earlier = None if session is None else self.goes_on_from(session)
        if earlier is not None:
            self._activate(earlier)
            self._active = None  # it is trained from here on

    def end_task(self, session: Session) -> None:
        self._files = self.tuner.files(self.backbone.model)
        self._keep(self._files[ADAPTER], session.classes, session.name, self.goes_on_from(session))
        self._files[ADAPTER] = self._adapters[-1]  # not the model's own, which change with every view
        self._learned(session)
        names = [self._labels[c] for c in session.classes]
        self._files[CLASSES] = {"classes": names, "task": session.name, "reopens": session.tasks[0].reopens}
        self.backbone.version += 1

    def _learned(self, session: Session) -> None:
        """What else a task leaves, with its adapter kept and in the model."""

    def _keep(self, adapter: dict[str, Tensor], classes: Sequence[int], name: str, reopened: int | None) -> None:
        self._adapters.append({name: t.detach().clone() for name, t in adapter.items()})
        self._classes.append(tuple(classes))
        self._names.append(name)
        self._reopened.append(reopened)
        self._active = len(self._adapters) - 1

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
            self._keep(stored_adapter(commit), classes, name, None if reopens is None else self._index(reopens, name))
            self._restore_task(task, commit)
        self._active = None
        self.backbone.version = len(commits)

    def _restore_task(self, task: int, commit: StoredFiles) -> None:
        """What else a task left."""

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
        return True

    # ---- predicting ----

    def task_classes(self, task: int) -> tuple[int, ...]:
        return self._classes[task]

    @contextlib.contextmanager
    def view(self, task: int | None) -> Iterator[None]:
        """The model with the adapter of a task; None: without any."""
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
        """There is one adapter in the model, whose values are exchanged: see `Slots`."""
        if task == self._active:
            return
        if self._slots is None:  # a newly attached model
            self._slots = Slots(self.tuner, self.backbone.model)
        self._slots.put(self._values(task))
        self._active = task

    def _values(self, task: int) -> dict[str, Tensor]:
        """The adapter of a task."""
        return self._adapters[task]
