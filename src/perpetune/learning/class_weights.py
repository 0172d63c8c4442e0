"""Weights of classes in the loss, for data in which some are rare."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ConfigError, nearest
from ..heads import RidgeHead
from ..recipes.recipe import Recipe

BALANCED = "balanced"
SETTING = "class_weights"


def checked(value: Any) -> str | dict[str, float] | None:
    """The setting as it is kept: "balanced", a weight by label text, or None for none.

    Raises:
        ConfigError: anything else, or a weight that is not positive.
    """
    if value is None or value in ("none", {}):
        return None
    if value == BALANCED:
        return BALANCED
    if not isinstance(value, Mapping):
        raise ConfigError(f"`{SETTING}` is balanced, none, or weights by label ({{rare: 20}}), not {value!r}")
    for label, weight in value.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
            raise ConfigError(f"`{SETTING}` of `{label}` must be a number above 0, not {weight!r}")
    return {str(label): float(weight) for label, weight in value.items()}


def check_class_weights(recipe: Recipe, value: Any, labels: Sequence[str]) -> None:
    """Before anything is trained: weights have an effect, and name labels that there are.

    Raises:
        ConfigError: nothing is trained with a loss over classes, or a label is unknown.
    """
    if value is None:
        return
    first = recipe.heads[0]
    trained = first if first.trains else first.trainer() if recipe.tuner.trains else None
    if isinstance(first, RidgeHead):
        raise ConfigError(
            f"`{SETTING}` has no effect on head `{first.name}`: its sums over samples are exact because none is "
            "weighed; use linear or label_text, or ncm, whose class means do not depend on how many samples there are"
        )
    if trained is None:
        raise ConfigError(
            f"`{SETTING}` weighs a loss, and nothing is trained with one here (head `{first.name}`, a frozen model): "
            "leave it out"
        )
    if not trained.weighs:
        raise ConfigError(
            f"`{SETTING}` has no effect on head `{trained.name}`, whose loss runs over texts: use linear or "
            "label_text, or leave it out"
        )
    for label in value if isinstance(value, dict) else ():
        if label not in labels:
            raise ConfigError(f"`{SETTING}` names no class of this stream, `{label}`: {nearest(label, labels)}")


def class_weights(value: str | dict[str, float], drawn: Sequence[int], labels: Sequence[str]) -> Tensor:
    """The weight of every class, (C,).

    "balanced": w_c = n / (k n_c) for the k classes that the session's n rows have, n_c rows each, so that every class
    weighs the same and the mean weight of a row is 1 (as scikit-learn has it); 1 for the others.

    Args:
        drawn: classes of the rows of the session, (n,); labels: the label texts of all classes, (C).
    """
    if isinstance(value, dict):
        return torch.tensor([value.get(label, 1.0) for label in labels])
    counts = torch.bincount(torch.tensor(list(drawn), dtype=torch.long), minlength=len(labels)).double()
    present = counts > 0
    weights = counts.sum() / (present.sum() * counts.clamp(min=1))
    return torch.where(present, weights, torch.ones_like(weights)).float()
