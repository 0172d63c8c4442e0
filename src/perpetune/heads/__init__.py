"""Heads: how a prediction is read off the features."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ..errors import ConfigError, nearest
from .base import Head
from .label_text import LabelTextHead
from .linear import LinearHead
from .opened import OpenedHead
from .prototype import PrototypeHead
from .ridge import RidgeHead

HEADS: dict[str, Callable[..., OpenedHead]] = {
    "linear": LinearHead,
    "linear_seen": partial(LinearHead, loss="seen"),
    "label_text": LabelTextHead,
    "ncm": PrototypeHead,
    "ridge": RidgeHead,
}


def make_head(name: str | Mapping[str, Any], **settings: Any) -> OpenedHead:
    """The head of this name, unopened: `make_head(head.name, **head.config())` is the same head.

    A mapping holds the name as `type`, and the settings.

    Raises:
        ConfigError: an unknown name or setting, or a setting out of range.
    """
    if not isinstance(name, str):
        given = dict(name)
        return make_head(str(given.pop("type", None)), **given, **settings)
    classes = {type(make()).__name__: make for make in reversed(HEADS.values())}
    if name in classes:
        return classes[name](**settings)
    if name not in HEADS:
        raise ConfigError(f"no head is called `{name}`: {nearest(name, HEADS)}")
    known = HEADS[name]().config()
    for setting in settings:
        if setting not in known:
            advice = nearest(setting, known) if known else "it has no settings"
            raise ConfigError(f"head `{name}` has no setting `{setting}`: {advice}")
    return HEADS[name](**settings)


__all__ = [
    "HEADS",
    "Head",
    "LabelTextHead",
    "LinearHead",
    "PrototypeHead",
    "RidgeHead",
    "make_head",
]
