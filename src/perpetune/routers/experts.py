"""A router made of others, which all observe the same samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from ..core.measurement import Measurement
from .base import Router, State


@dataclass
class Experts(Router):
    """What is known of a task is what each expert knows of it, its names preceded by the expert's (`tasks.gram`).

    A subclass makes the experts, by name, and says how they become one.
    """

    _experts: dict[str, Router] = field(default_factory=dict, init=False, repr=False, compare=False)

    def columns(self, name: str, width: int) -> slice:
        """Which columns of features of this width an expert reads."""
        return slice(None)

    def read(self, name: str, features: Tensor) -> Tensor:
        """What an expert reads of the features, (N x L), of which some columns stay."""
        if features.ndim != 2 or features.shape[1] != self.width:
            return features  # which it refuses
        return features[:, self.columns(name, self.width)]

    def open(self, width: int, labels: Sequence[str], *, seed: int) -> None:
        for name, expert in self._experts.items():
            expert.open(len(range(width)[self.columns(name, width)]), labels, seed=seed)
        super().open(width, labels, seed=seed)

    def observe(self, task: int, features: Tensor, labels: Tensor, ids: Sequence[str]) -> None:
        for name, expert in self._experts.items():
            expert.observe(task, self.read(name, features), labels, ids)
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

    def guarantee(self) -> list[Measurement]:
        own = super().guarantee()
        theirs = [m for expert in self._experts.values() for m in expert.guarantee() if m.bound is not None]
        return [*own, *(replace(m, name=f"{m.source}: {m.name}", source=self._name) for m in theirs)]


def _part(state: Mapping[str, Tensor], name: str) -> State:
    return {key[len(name) + 1 :]: tensor for key, tensor in state.items() if key.startswith(name + ".")}
