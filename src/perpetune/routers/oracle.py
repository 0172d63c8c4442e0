"""The router that is given the task: the upper bound of every other router."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from .base import Router, RouterError, State


@dataclass
class OracleRouter(Router):
    """Stores nothing: the caller of a prediction names the task."""

    needs_task: ClassVar[bool] = True

    def summarise(self, features: Tensor, labels: Tensor, ids: Sequence[str]) -> State:
        return {}

    def combine(self, one: State, other: State) -> State:
        return {}

    def check_state(self, state: State) -> None:
        if state:
            raise RouterError(f"OracleRouter stores nothing, the checkpoint holds `{min(state)}`: use its own router")

    def plain(self) -> tuple[dict[str, Any], State]:
        """See `Router.plain`: nothing."""
        return {"type": self._name}, {}

    def route(self, features: Tensor) -> Tensor:
        """Always raises RouterError."""
        raise RouterError("OracleRouter cannot tell the task of an input: give the task, or use another router")
