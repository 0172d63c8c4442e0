"""What records are made of: costs of tasks, accuracies of classes, and values in JSON's own types."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict


@with_config(ConfigDict(extra="forbid"))
class ClassShare(TypedDict):
    """The accuracy of one class at the end, and of how many test examples."""

    label: str
    accuracy: float
    examples: int


@with_config(ConfigDict(extra="forbid"))
class TaskCost(TypedDict):
    """What one task took; None where it was not measured."""

    task: str
    train_seconds: float | None
    evaluate_seconds: float | None
    steps: int | None
    peak_memory_bytes: int | None
    disk_bytes: int | None


def finite_or_none(values: np.ndarray) -> list[Any]:
    """The values as nested lists, None where one is not finite."""
    found = values.astype(object)
    found[~np.isfinite(values)] = None
    return found.tolist()


def plain(value: Any) -> Any:
    """The value in JSON's own types; numbers that are not finite become None."""
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        return finite_or_none(value)
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return plain(value.to_dict()) if hasattr(value, "to_dict") else value
