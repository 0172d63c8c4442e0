"""What every router shares: it keeps something of each task apart, checks what it is given, and knows its state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.errors import PerpetuneError, nearest
from ..core.measurement import Measurement

State = dict[str, Tensor]


class RouterError(PerpetuneError):
    """A router cannot read these features, has not seen a task yet, or no longer fits its checkpoint."""


@dataclass
class Router:
    """Which task does an input belong to? Read off frozen features f in R^{N x L}, adapters off.

    What is known of a task is made of that task's samples alone and kept apart: other tasks never change a bit of it,
    it can be stored with the task, and forgotten exactly. Tasks are known by an index; they may come in any order.

    Life of a router: `open` once, `observe` at the end of each task, then any number of `route`. A resumed run calls
    `open`, then `load_state`, or `load_task_state` for each finished task.

    Attributes:
        needs_task: the router knows nothing; the caller of a prediction must name the task.
        width: L; labels: the label texts of the stream; seed: of whatever is random.
        known: by task, what is stored of it.
    """

    needs_task: ClassVar[bool] = False
    width: int = field(default=0, init=False, repr=False, compare=False)
    labels: tuple[str, ...] = field(default=(), init=False, repr=False, compare=False)
    seed: int = field(default=0, init=False, repr=False, compare=False)
    known: dict[int, State] = field(default_factory=dict, init=False, repr=False, compare=False)

    def open(self, width: int, labels: Sequence[str], *, seed: int) -> None:
        """Start from nothing.

        Raises:
            RouterError: features without a column, or no labels.
        """
        if width < 1 or not labels:
            raise RouterError(f"{self._name}: features of width {width}, {len(labels)} labels; it needs one of each")
        self.width, self.labels, self.seed, self.known = width, tuple(labels), seed, {}
        self.changed()

    @property
    def tasks(self) -> list[int]:
        """The tasks observed so far, in ascending order."""
        return sorted(self.known)

    @property
    def calibrated(self) -> bool:
        """Whether `log_posterior` can be called now; what it gives then is meant as a probability."""
        return False

    def observe(self, task: int, features: Tensor, labels: Tensor, ids: Sequence[str]) -> None:
        """Learn from the training samples of a task; observed again, a task adds to what is known of it.

        Args:
            features: (n x L); labels: (n,) global class indices; ids: (n,) the samples' content hashes.

        Raises:
            RouterError: no samples, shapes that do not match, features that are not finite, a label that is no class,
                or a task index below 0.
        """
        features = self.checked_queries(features)
        if task < 0:
            raise RouterError(f"{self._name}: task {task}; tasks are counted from 0")
        if not len(features) == labels.numel() == len(ids) > 0:
            raise RouterError(
                f"{self._name}: {len(features)} features, {labels.numel()} labels and {len(ids)} ids; each sample "
                "needs one of each, and a task needs a sample"
            )
        if not (0 <= int(labels.min()) and int(labels.max()) < len(self.labels)):
            raise RouterError(f"{self._name}: a label is not one of the {len(self.labels)} classes of this stream")
        found = self.summarise(features, labels.cpu().long(), ids)
        self.known[task] = self.combine(self.known[task], found) if task in self.known else found
        self.changed()

    def summarise(self, features: Tensor, labels: Tensor, ids: Sequence[str]) -> State:
        """What to store of one task, from its features (n x L, fp64, CPU) and labels (n,), in any order."""
        raise NotImplementedError

    def combine(self, one: State, other: State) -> State:
        """What to store of a task that was observed twice."""
        raise NotImplementedError

    def changed(self) -> None:
        """Forget whatever was computed from `known`."""

    def route(self, features: Tensor) -> Tensor:
        """The task of each sample, (N,) int64; of equally good tasks, the lowest.

        Raises:
            RouterError: no task was observed, features of another width or not finite.
        """
        raise NotImplementedError

    def log_posterior(self, features: Tensor) -> Tensor:
        """log p(task | x), (N x T), T = highest task + 1; the column of a task that was not observed is -inf.

        Raises:
            RouterError: as `route`; or the router is not `calibrated`.
        """
        raise RouterError(f"{self._name} gives no probabilities: call `route`, or use RidgeRouter")

    def log_within(self, features: Tensor, task: int) -> Tensor | None:
        """The router's own prediction within a task, log p(c | x, t): (N x C), -inf for all other classes; None where
        it makes none."""
        return None

    def log_classes(self, features: Tensor) -> Tensor | None:
        """The router's own prediction among the classes of all tasks, log p(c | x) = log sum_t p(t, c | x): (N x C),
        -inf for classes that it has not seen; None where it makes none."""
        return None

    def plain(self) -> tuple[dict[str, Any], State] | None:
        """What a route needs where perpetune is not: settings as JSON-able data, and tensors. docs/how-to/serve.md says
        how they are used. `task_of` (K,) is the task of each centre or column. None: the router has no such form."""
        return None

    # What is saved

    def task_state(self, task: int) -> State:
        """What is known of one task.

        Raises:
            RouterError: the task was not observed.
        """
        return {name: tensor.clone() for name, tensor in self.known[self._observed(task)].items()}

    def load_task_state(self, task: int, state: Mapping[str, Tensor]) -> None:
        """Inverse of `task_state`: afterwards this is all that is known of the task. Tensors are held, and not copied:
        those of a file are mapped.

        Raises:
            PerpetuneError: the state is not one of this router (names, shapes).
        """
        self.known[task] = self._read(state)
        self.changed()

    def hold_mapped(self, task: int, state: Mapping[str, Tensor]) -> None:
        """Take the tensors of a file, which are read from there when they are needed, in place of those in memory.

        Args:
            state: what `task_state` gave, from the file that it was written to.
        """
        held = self.known[self._observed(task)]  # the same dictionary: nothing has changed
        for name in held:
            held[name] = state[name]

    def _read(self, state: Mapping[str, Tensor]) -> State:
        held = {name: tensor.detach().cpu() for name, tensor in state.items()}
        self.check_state(held)
        return held

    def check_state(self, state: State) -> None:
        """Raise PerpetuneError where what is stored of a task does not fit this router."""
        raise NotImplementedError

    def state(self) -> State:
        """Everything needed to go on: `task_state` of each task, its names preceded by the task (`3.centres`)."""
        return {f"{task}.{name}": tensor for task in self.tasks for name, tensor in self.task_state(task).items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state`, after `open`; tasks that it does not hold are forgotten.

        Raises:
            PerpetuneError: the state is not one of this router (names, shapes).
        """
        parts: dict[int, State] = {}
        for name, tensor in state.items():
            task, dot, rest = name.partition(".")
            if not (task.isdecimal() and dot):
                raise RouterError(f"{self._name}: expected names like `0.centres` in the checkpoint, found `{name}`")
            parts.setdefault(int(task), {})[rest] = tensor
        self.known = {number: self._read(part) for number, part in parts.items()}
        self.changed()

    def forget(self, task: int) -> None:
        """As if the task had never been observed, to the bit.

        Raises:
            RouterError: the task was not observed.
        """
        del self.known[self._observed(task)]
        self.changed()

    def guarantee(self) -> list[Measurement]:
        """The promises of this router and their measurements."""
        stored = [sum(t.numel() * t.element_size() for t in state.values()) for state in self.known.values()]
        note = "What the router keeps of one task; no sample is kept."
        return [Measurement("stored for a task", float(max(stored, default=0)), None, "bytes", self._name, note)]

    # What is given

    @property
    def _name(self) -> str:
        return type(self).__name__

    def checked_queries(self, features: Tensor) -> Tensor:
        """Features (N x L) in fp64 on the CPU."""
        if not self.width:
            raise RouterError(f"{self._name} is not open yet: call `open(width, labels, seed=...)` first")
        if features.ndim != 2 or features.shape[1] != self.width:
            raise RouterError(
                f"{self._name}: expected features of shape (N, {self.width}), found {tuple(features.shape)}"
            )
        features = features.detach().cpu().to(torch.float64)
        if not torch.isfinite(features).all():
            raise RouterError(f"{self._name}: features are not finite; the model gives NaN or infinity")
        return features

    def check_observed(self) -> None:
        if not self.known:
            raise RouterError(f"{self._name}: no task was observed yet; call `observe` at the end of a task")

    def _observed(self, task: int) -> int:
        if task not in self.known:
            raise RouterError(f"{self._name}: task {task} was not observed; {nearest(str(task), map(str, self.tasks))}")
        return task
