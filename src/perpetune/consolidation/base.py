"""The consolidation slot: what a finished task leaves behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import datasets
from torch import Tensor

from ..core.errors import ConfigError
from ..core.measurement import Measurement
from ..heads import Head
from ..models.backbone import Backbone
from ..streams.task import Stream, Task
from ..tuners import AllWeights, Tuner

if TYPE_CHECKING:
    from .states import PerTaskStates

Adapters = Literal["newest", "sum", "each"]
Files = dict[str, Any]  # file name -> dict of tensors (.safetensors), JSON-able (.json) or Dataset (.parquet)


@dataclass(frozen=True)
class Session:
    """One session of training: usually one task; all at once for joint training.

    Attributes:
        index: 0-based; tasks: what is learned in it; first: position of its first task in the stream.
    """

    index: int
    name: str
    tasks: tuple[Task, ...]
    first: int

    @property
    def classes(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(c for task in self.tasks for c in task.classes))

    @property
    def learned(self) -> int:
        """How many tasks of the stream are learned once this session is done."""
        return self.first + len(self.tasks)


class StoredFiles(Protocol):
    """A commit, as far as a consolidation needs it."""

    def tensors(self, name: str) -> dict[str, Tensor]: ...
    def rows(self, name: str) -> datasets.Dataset: ...
    def json(self, name: str) -> Any: ...
    def has(self, name: str) -> bool: ...


@dataclass
class Consolidation:
    """Owns the backbone's weights between tasks. Order of calls per task: `begin_task`, training, `end_task`, `judge`,
    `files`, `committed`.

    A resumed run calls `open` on a fresh backbone, then `restore` with all commits so far: from then on every bit is as
    if it had never stopped.

    Attributes:
        adapters: what the adapters in commits are together ("newest": the last is the model; "sum": their changes add
            up on the base; "each": every task predicts with its own), or None where commits hold none.
        branch: whether a task goes on with the tuner of the task before ("kept") or starts with a new one ("fresh").
    """

    adapters: ClassVar[Adapters | None] = None
    backbone: Backbone = field(init=False, repr=False, compare=False)
    tuner: Tuner = field(init=False, repr=False, compare=False)

    @property
    def branch(self) -> Literal["kept", "fresh"]:
        return "kept"

    def open(self, backbone: Backbone, tuner: Tuner, labels: Sequence[str] = ()) -> None:
        """Take over an untouched backbone. `labels` are the label texts of all classes."""
        self.backbone, self.tuner = backbone, tuner
        tuner.reads(backbone)

    def schedule(self, stream: Stream) -> list[Session]:
        return [Session(i, task.name, (task,), i) for i, task in enumerate(stream)]

    def rows(self, session: Session) -> datasets.Dataset:
        """The training rows of a session."""
        return session.tasks[0].train

    def classes(self, session: Session) -> tuple[int, ...]:
        """The classes of the training rows of a session."""
        return session.classes

    def reads(self, learned_in: int, now: int) -> int:
        """Which session's own head reads a task in the task-incremental reading: the one that learned it."""
        return learned_in

    def adapts(self, session: Session) -> bool:
        """Whether the model is trained in this session; where it is not, nothing but a head that is read is."""
        return True

    def begin_task(self, session: Session) -> None:
        """Make the backbone trainable for this session."""
        raise NotImplementedError

    def end_task(self, session: Session) -> None:
        """Consolidate what was trained; the backbone is now as it predicts."""
        raise NotImplementedError

    def judge(self, session: Session, head: Head) -> None:
        """Look once more at what was learned, now that heads have gathered too; with the head that is read first."""

    def files(self) -> Files:
        """What the commit of the session just ended must hold."""
        raise NotImplementedError

    def committed(self, commit: StoredFiles) -> None:
        """What `files` gave is on disk, in this commit: it can be read there, and need not be held."""

    def restore(self, commits: Sequence[StoredFiles]) -> None:
        """Put the untouched backbone into the state after these commits: those of the tasks that were learned and not
        taken out again."""
        raise NotImplementedError

    def compose(self, commits: Mapping[str, StoredFiles], scales: Mapping[str, float]) -> None:
        """Instead of `restore`: put the backbone's weights to the base + sum_t scale_t * (what task t left on them).

        Args:
            commits: by the name of the task, in the order of learning.
            scales: of the chosen tasks; the others are left out.

        Raises:
            ConfigError: tasks leave nothing on the weights that could be left out or scaled.
        """
        raise ConfigError(
            f"{type(self).__name__} keeps no change of each task on the weights, so no task can be chosen, left out or "
            "scaled: use a recipe with DeltaMerge (`sotu`) or Merge (`lora`), or export the model as it is"
        )

    def start_of_next(self, newest: StoredFiles) -> dict[str, Tensor]:
        """What the tuner of the next task starts from, after the newest commit; empty where it starts anew."""
        return stored_adapter(newest) if self.branch == "kept" else {}

    def separable(self, tuner: Tuner) -> bool:
        """Whether `restore` may be given the commits of some tasks, as if the others had left nothing."""
        return not tuner.trains

    def keeps_base(self, tuner: Tuner) -> bool:
        """Whether the weights of the base stay as they are, so that they may be quantised or of half precision, where
        small changes would be lost."""
        return not isinstance(tuner, AllWeights)

    @property
    def independent(self) -> bool:
        """Whether what a task leaves is made without what earlier tasks left."""
        return False

    @property
    def states(self) -> PerTaskStates | None:
        """Where the model has a state for every task: how these are read; None where it has one for all."""
        return None

    def guarantee(self) -> list[Measurement]:
        return []

    def decision(self) -> str | None:
        """In one line what decides a prediction on the tasks so far, and why, where that follows from the tasks."""
        return None


def stored_adapter(commit: StoredFiles) -> dict[str, Tensor]:
    for name in ("adapter_model.safetensors", "weights.safetensors"):
        if commit.has(name):
            return commit.tensors(name)
    return {}


def positive(name: str, value: float) -> None:
    if not value > 0:
        raise ConfigError(f"{name} must be above 0, not {value}")
