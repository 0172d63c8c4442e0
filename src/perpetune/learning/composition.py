"""Which tasks a model is composed of, what that is worth, and plain models without adapters around them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..core.errors import ConfigError, ModelError, nearest
from ..heads import Head, LinearHead

if TYPE_CHECKING:
    from ..recipes.recipe import Recipe
    from ..runs.result import Result


def choose(
    learned: Sequence[str],
    only: Sequence[str] | None = None,
    without: Collection[str] = (),
    scales: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """The factor of every chosen task, in the order of learning.

    Args:
        learned: tasks there are.
        only: tasks to take; None takes all.
        without: tasks to leave out.
        scales: factors other than 1.

    Raises:
        ConfigError: an unknown task, contradicting choices, no task left, or a factor that is 0 or not finite.
    """
    scales = dict(scales or {})
    for task in (*(only or ()), *without, *scales):
        if task not in learned:
            raise ConfigError(f"this run has learned no task `{task}`: {nearest(task, learned)}")
    if only is not None and without:
        raise ConfigError("`only` says what to take and `without` what to leave out: give one of them")
    chosen = [t for t in learned if t not in without and (only is None or t in only)]
    if not chosen:
        raise ConfigError("no task is left, and that is the base model itself: choose at least one task")
    for task, scale in scales.items():
        if task not in chosen:
            raise ConfigError(f"task `{task}` is left out and has a scale: take one of them away")
        if not math.isfinite(scale) or scale == 0:
            raise ConfigError(
                f"the scale of `{task}` must be a number other than 0, not {scale}: to leave it out, say so"
            )
    return {task: float(scales.get(task, 1.0)) for task in chosen}


def ties(recipe: Recipe, result: Result) -> str | None:
    """What tied the deltas of this run's tasks together in training; None where each was made from the base alone.

    A delta that was made with a part of another task in sight does not forget that task when the task is left out.
    """
    head: Any = recipe.heads[0] if recipe.heads[0].trains else recipe.heads[0].trainer()
    if recipe.tuner.trains and not recipe.consolidation.independent:
        return "each was trained on top of those before it"
    if recipe.rules:
        names = ", ".join(type(rule).__name__ for rule in recipe.rules)
        return f"the rules ({names}) carry over from task to task"
    if getattr(head, "loss_over", "current") == "seen":
        return "the head that trained them saw the classes of earlier tasks"
    _, targets = result.predictions(*result.readings[0])
    shared = any(set(a.tolist()) & set(b.tolist()) for a, b in combinations(targets.values(), 2))
    if shared and isinstance(head, LinearHead):
        return "tasks share classes, and the head that trained them carries their rows over"
    return None


def stale(recipe: Recipe, result: Result, task: str) -> str | None:
    """What ties a task to heads when it is taken out: statistics of later tasks, gathered with features that it had
    shaped; None where there are none."""
    if task == result.tasks[-1] or not recipe.tuner.trains or recipe.consolidation.routed:
        return None
    names = [h.name for h in recipe.heads if type(h).observe is not Head.observe and not h.refresh]
    if not names:
        return None
    return f"{' and '.join(names)} gathered later tasks with features that it had shaped (refresh gathers anew)"


def plain(model: Any, folder: Path) -> nn.Module:
    """The transformers model with its adapters merged into the weights, in place.

    Args:
        folder: where the adapter is stored, for the message.

    Raises:
        ConfigError: no weights could hold this adapter.
    """
    if not hasattr(model, "peft_config"):
        return model
    try:
        return model.merge_and_unload(safe_merge=True)
    except (ModelError, AttributeError, NotImplementedError, ValueError) as error:
        if "NaN" in str(error):
            raise ConfigError(
                f"the adapter in {folder} holds numbers that are not finite, and nothing can be merged: take the task "
                "out (perpetune revert), and learn it again with a lower learning_rate"
            ) from error
        reason = str(error).splitlines()[0].split(":")[0] if isinstance(error, ModelError) else "peft cannot merge it"
        kind = type(next(iter(model.peft_config.values()))).__name__
        raise ConfigError(
            f"there is no plain model of a {kind} run ({reason}): load its adapter onto the base model with "
            f"perpetune.load_adapter(model, {str(folder)!r})"
        ) from error
