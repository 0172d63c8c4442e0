"""Which adapter answers which input, in a form that is read without perpetune: `routes.json`, and the router's tensors.

docs/how-to/serve.md describes both, with a router in plain torch that reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..consolidation import Concatenate, PerTask
from ..models.backbone import Backbone
from ..routers import Router
from .state import LearnerState

ROUTES, ROUTER = "routes.json", "router.safetensors"
VERSION = 1


@dataclass(frozen=True)
class Served:
    """An adapter of an export.

    Attributes:
        name: what it is called, and its folder.
        tasks: those that it answers for; labels: the label texts among which it chooses; none for free texts.
        index: of the session that trained it, where every task has its own; -1 where one answers for all.
        rank: the largest of its modules.
    """

    name: str
    tasks: tuple[str, ...]
    labels: tuple[str, ...]
    index: int
    rank: int


def routes(state: LearnerState, served: list[Served], base: str | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `routes.json` holds, and the tensors of the router (none where there is nothing to route)."""
    settings, tensors = _router(state, served)
    backbone = state.backbone
    return {
        "format": "perpetune-routes",
        "version": VERSION,
        "base_model": base,
        "fingerprint": backbone.fingerprint,
        "modality": backbone.modality,
        "adapters": [
            {"name": s.name, "folder": s.name, "rank": s.rank, "tasks": list(s.tasks), "labels": list(s.labels)}
            for s in served
        ],
        "router": settings,
    }, tensors


def routed(router: Mapping[str, Any]) -> str:
    """In words which adapter answers, of the router in `routes.json`."""
    if "how" in router:
        return f"{router['type']}: {router['how']}"
    return f"`{ROUTES}` says which adapter answers which input ({router['type']})"


def _router(state: LearnerState, served: list[Served]) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """Settings and tensors of the router; the tasks of its columns become positions among the adapters."""
    consolidation: Any = state.consolidation
    if consolidation.states is None:
        return None, {}
    if isinstance(consolidation, Concatenate):
        return {"type": "all", "how": "every adapter reads every input, and heads read all features side by side"}, {}
    router = getattr(consolidation, "router", None)
    # what it reads of several layers or views has no form there either
    once = state.backbone.layers == 1 and not state.backbone.views
    plain = router.plain() if isinstance(router, Router) and once else None
    if plain is None:
        kind = type(router or consolidation).__name__
        return {"type": kind, "how": "it has no form outside of perpetune: name the adapter"}, {}
    settings, tensors = plain
    if not tensors:
        return {**settings, "how": "whoever asks names the task, and with it the adapter"}, {}
    if not {*consolidation.router.tasks} <= {s.index for s in served}:
        return {**settings, "how": "it routes among all tasks of the run, and some are not here: name the adapter"}, {}
    place = {s.index: i for i, s in enumerate(served)}
    placed = {
        k: t.new_tensor([place[i] for i in t.tolist()]) if k.endswith("task_of") else t for k, t in tensors.items()
    }
    adapted = isinstance(consolidation, PerTask) and consolidation.features == "first_adapted"
    how = {
        "features": {**_features(state.backbone), "model": served[0].name if adapted else "base"},
        "candidates": consolidation.candidates,
        "mass": consolidation.mass,
        "prior": consolidation.prior,
        **({"frozen": consolidation.frozen} if consolidation.frozen else {}),
    }
    return {**settings, **how, "tensors": ROUTER}, placed


def _features(backbone: Backbone) -> dict[str, Any]:
    """What the router reads of an input, one vector of `width`."""
    found = {"width": backbone.pooled_width, "max_length": backbone.max_length}
    if backbone.modality == "language":
        return {
            **found,
            "pooling": "mean",
            "of": "last hidden states of the prompt (of the encoder, where there is one)",
        }
    if backbone.pooling is None:
        return {**found, "pooling": None, "of": "image features of the dual encoder, of length 1"}
    return {**found, "pooling": backbone.pooling, "of": "last hidden states of the input"}
