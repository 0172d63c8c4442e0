"""What run.yaml of earlier runs calls otherwise, in the words of today. Nothing on disk is changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def in_todays_words(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a run with today's names of pieces and settings."""
    recipe = config.get("recipe")
    kept = recipe.get("consolidation") if isinstance(recipe, dict) else None
    if not isinstance(recipe, dict) or not isinstance(kept, dict) or kept.get("type") != "SparseSum":
        return config
    return {**config, "recipe": {**recipe, "consolidation": {"type": "DeltaMerge", **delta_merge(kept)}}}


def delta_merge(sparse_sum: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `DeltaMerge` that are those of a `SparseSum`."""
    old = {
        "keep": 0.1, "scheme": "bernoulli", "scale": 1.0, "sequential": False, "vectors": "masked", "storage": "fp32",
        "seed": 0, **sparse_sum,
    }  # fmt: skip
    mask = {name: old[name] for name in ("scheme", "vectors", "seed")}
    keep: dict[str, Any] = {"type": "RandomMask", "share": old["keep"], **mask}
    if old["keep"] == 1 and mask == {"scheme": "bernoulli", "vectors": "masked", "seed": 0}:
        keep = {"type": "Everything"}
    rest = {name: old[name] for name in ("scale", "sequential", "storage")}
    return {"keep": keep, "combine": {"type": "Sum"}, **rest}
