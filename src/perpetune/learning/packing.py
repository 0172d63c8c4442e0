"""States of optimizers, schedulers and random generators as tensors and JSON, so that nothing has to be pickled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from ..core.errors import TrainingError
from ..rules.shards import whole

# JSON has neither tuples nor dicts with other keys than text: these stand for them, with their contents as a list
TUPLE, DICT, ARRAY, TENSOR = "tuple", "dict", "array", "tensor"


def packed(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A state as JSON, its tensors put aside under names that begin with `name`. Sharded ones are gathered, on every
    process alike.

    Raises:
        TrainingError: it holds something else.
    """
    if isinstance(value, Tensor):
        while name in tensors:  # `a.b` in `c` and `b` in `c.a`
            name += "'"
        tensors[name] = whole(value).cpu()
        return {TENSOR: name}
    if isinstance(value, np.ndarray):
        return {ARRAY: [str(value.dtype), value.tolist()]}
    if isinstance(value, dict):
        return {DICT: [[key, packed(held, f"{name}.{key}", tensors)] for key, held in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [packed(held, f"{name}.{i}", tensors) for i, held in enumerate(value)]
        return {TUPLE: items} if isinstance(value, tuple) else items
    if isinstance(value, np.generic):
        return packed(value.item(), name, tensors)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TrainingError(
        f"a checkpoint of {name} would have to hold a {type(value).__name__}, which goes into no safe file: leave "
        "save_steps out, or choose another optimizer or schedule"
    )


def unpacked(value: Any, tensor: Callable[[str], Tensor]) -> Any:
    """Inverse of `packed`; `tensor` gives the tensor of a name."""
    if isinstance(value, list):
        return [unpacked(held, tensor) for held in value]
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == TENSOR:
        return tensor(held)
    if kind == ARRAY:
        return np.array(held[1], held[0])
    if kind == TUPLE:
        return tuple(unpacked(each, tensor) for each in held)
    return {key: unpacked(each, tensor) for key, each in held}
