"""The numbers among training settings: finite, in their range, and whole where they count something."""

from __future__ import annotations

import math
import typing
from functools import cache
from typing import Any

from transformers import TrainingArguments

from ..core.errors import ConfigError
from .self_distillation import SDFT
from .settings import bare
from .token_masking import STM

_COUNTS = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "max_steps",
    SDFT,
)
_ABOVE_ZERO = (*_COUNTS, "num_train_epochs", STM)
_NOT_BELOW_ZERO = "learning_rate head_learning_rate weight_decay max_grad_norm warmup_steps neftune_noise_alpha".split()
_LEFT_OUT = ((STM, None), (SDFT, None), ("max_steps", -1))  # as if they were not given


def in_range(settings: dict[str, Any]) -> dict[str, Any]:
    """Training settings, in which whole numbers are `int`.

    Raises:
        ConfigError: a number that is NaN, infinite, out of its range, or not whole where it counts something.
    """
    checked = dict(settings)
    for key, value in settings.items():
        if (key, value) in _LEFT_OUT:
            if value is None:
                del checked[key]
        elif key in _ABOVE_ZERO:
            checked[key] = _above_zero(key, value)
        elif key in _NOT_BELOW_ZERO:
            value = value or 0.0
            if not isinstance(value, (int, float)) or value is True or not 0 <= value < math.inf:
                raise ConfigError(f"`{key}` must be a number, 0 or above, not {value!r}")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"`{key}` = {value!r} is no number to train with: give a finite one, or leave it out")
        elif isinstance(value, float) and key in _whole():
            if value != int(value):
                raise ConfigError(f"`{key}` must be a whole number, not {value!r}")
            checked[key] = int(value)
    if STM in checked:
        checked[STM] = float(checked[STM])
    return checked


def _above_zero(key: str, value: Any) -> Any:
    whole = key in _COUNTS
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
    if not number or (whole and value != int(value)):
        raise ConfigError(f"`{key}` must be a {'whole ' if whole else ''}number above 0, not {value!r}")
    return int(value) if whole else value


@cache
def _whole() -> frozenset[str]:
    """The settings that transformers wants to be whole numbers."""
    return frozenset(key for key, kind in typing.get_type_hints(TrainingArguments).items() if bare(kind) is int)
