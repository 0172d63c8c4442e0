"""Several routers as one: the logarithmic opinion pool of ridge on tasks, ridge on classes, discriminant analysis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..core.measurement import Measurement
from .base import Router, State
from .classes import ClassRouter
from .lda import LDARouter
from .ridge import RidgeRouter
from .sums import SumsRouter

LEAST = 1e-3  # nats, of an expected log-loss


@dataclass
class PooledRouter(Router):
    """p(t | x) ~ (p_R(t | x) p_C(t | x))^(1/2), p_R of `RidgeRouter` on the features as they are, p_C of `ClassRouter`.

    Either is better by far on some streams: tasks with a look of their own, or tasks that only their classes tell
    apart. The pool is about as good as the better one on those that we tried (docs/explanation/routing.md).

    With `discriminants` a third takes part, p_L of `LDARouter` on features of length 1, and the exponent is 1/3. Among
    the classes of all tasks the pool then predicts p(c | x) ~ (p_C(c | x) p_L(c | x))^(1/2), and p_C(c | x) without.

    With `together` there is a pool where tasks have too few samples for moments of their own, too, and experts count by
    what hold-outs of all tasks together expect of them (`SumsRouter.tempered`): exponents in proportion to e^-2, e the
    log-loss of the task. Ridge on two hundred tasks of thirty samples knows little that their classes do not.

    Args:
        features: random features of the `ClassRouter`; 0 for none.
        many_tasks: see `RidgeRouter` and `ClassRouter`; together: see above.
        discriminants: see above.

    Raises:
        ConfigError: an argument out of range.
    """

    features: int = 1024
    many_tasks: bool = field(default=False, metadata={"unwritten": False})
    discriminants: bool = field(default=False, metadata={"unwritten": False})
    together: bool = field(default=False, metadata={"unwritten": False})
    _experts: dict[str, SumsRouter] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._experts = {
            "tasks": RidgeRouter(many_tasks=self.many_tasks, together=self.together),
            "classes": ClassRouter(self.features, many_tasks=self.many_tasks, together=self.together),
        }
        if self.discriminants:
            self._experts["discriminants"] = LDARouter(many_tasks=self.many_tasks, together=self.together)

    def open(self, width: int, labels: Sequence[str], *, seed: int) -> None:
        for expert in self._experts.values():
            expert.open(width, labels, seed=seed)
        super().open(width, labels, seed=seed)

    def observe(self, task: int, features: Tensor, labels: Tensor, ids: Sequence[str]) -> None:
        for expert in self._experts.values():
            expert.observe(task, features, labels, ids)
        self.known[task] = self._held(task)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        super().load_state(state)
        for expert in self._experts.values():
            expert.load_state({})
        for task in self.tasks:
            self._load(task, self.known[task])

    def load_task_state(self, task: int, state: Mapping[str, Tensor]) -> None:
        self._load(task, state)
        self.changed()

    def _load(self, task: int, state: Mapping[str, Tensor]) -> None:
        """What is known of a task is held once, by the experts."""
        for name, expert in self._experts.items():
            expert.load_task_state(task, _part(state, name))
        self.known[task] = self._held(task)

    def hold_mapped(self, task: int, state: Mapping[str, Tensor]) -> None:
        for name, expert in self._experts.items():
            expert.hold_mapped(task, _part(state, name))
        self.known[task] = self._held(task)

    def check_state(self, state: State) -> None:
        for name, expert in self._experts.items():
            expert.check_state(_part(state, name))

    def _held(self, task: int) -> State:
        return {f"{name}.{k}": v for name, e in self._experts.items() for k, v in e.known[task].items()}

    def forget(self, task: int) -> None:
        for expert in self._experts.values():
            expert.forget(task)
        super().forget(task)

    @property
    def calibrated(self) -> bool:
        return all(expert.calibrated for expert in self._experts.values())

    def route(self, features: Tensor) -> Tensor:
        if self.calibrated:
            return self.log_posterior(features).argmax(1)
        self.check_observed()
        return self._experts["tasks"].route(features)

    def log_posterior(self, features: Tensor) -> Tensor:
        self.check_observed()
        parts = self._parts()
        pooled = sum(expert.log_posterior(features) / parts[name] for name, expert in self._experts.items())
        assert isinstance(pooled, Tensor)
        return torch.log_softmax(pooled, 1)

    def _parts(self) -> dict[str, float]:
        """One over the exponent of each expert."""
        if all(expert.enough for expert in self._experts.values()) or not self.calibrated:
            return dict.fromkeys(self._experts, float(len(self._experts)))
        losses = {name: max(expert.tempered()[1], LEAST) for name, expert in self._experts.items()}
        total = sum(loss**-2 for loss in losses.values())
        return {name: total * loss**2 for name, loss in losses.items()}

    def plain(self) -> tuple[dict[str, Any], State] | None:
        """See `Router.plain`: both experts; names of tensors are preceded by `tasks.` and `classes.`; and the exponent
        of the first, where there is a posterior. None with discriminants."""
        if self.discriminants:
            return None
        parts = {name: expert.plain() for name, expert in self._experts.items()}
        settings = {name: part[0] for name, part in parts.items() if part}
        tensors = {f"{name}.{k}": v for name, part in parts.items() if part for k, v in part[1].items()}
        share = 1 / self._parts()["tasks"] if self.calibrated else None
        return {"type": self._name, "experts": settings, "share": share}, tensors

    def log_within(self, features: Tensor, task: int) -> Tensor | None:
        return self._experts["classes"].log_within(features, task)

    def log_classes(self, features: Tensor) -> Tensor | None:
        found = [e.log_classes(features) for name, e in self._experts.items() if name != "tasks"]
        held = [log_p for log_p in found if log_p is not None]
        return torch.stack(held).mean(0).log_softmax(1) if self.calibrated and len(held) == len(found) else None

    def guarantee(self) -> list[Measurement]:
        own = super().guarantee()
        theirs = [m for expert in self._experts.values() for m in expert.guarantee() if m.bound is not None]
        return [*own, *(replace(m, name=f"{m.source}: {m.name}", source=self._name) for m in theirs)]


def _part(state: Mapping[str, Tensor], name: str) -> State:
    return {key[len(name) + 1 :]: tensor for key, tensor in state.items() if key.startswith(name + ".")}
