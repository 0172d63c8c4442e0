"""Heads: how a prediction is read off the features."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ..core.errors import ConfigError, nearest
from ..core.plugins import with_installed
from ..core.validation import as_written, call_checked
from .anacp import AnaCPHead
from .base import Head
from .carried import Carried, lda_carried, ncm_carried, ridge_carried
from .closed_form import ClosedFormHead
from .contrastive import ContrastiveHead
from .label_text import LabelTextHead
from .language import LONGEST, LanguageHead, Read
from .lda import KLDAHead, LDAHead
from .lda_ridge import LDARidgeHead
from .linear import LinearHead
from .own_classifier import OwnClassifierHead
from .prototype import PrototypeHead
from .ridge import RidgeHead
from .stateful import OpenedHead
from .subspaces import SubspaceHead
from .trained import Classes


def linear_seen(loss: Classes = "seen") -> LinearHead:
    """The linear head with its loss over all classes seen so far."""
    return LinearHead(loss)


def ncm_refresh(refresh: bool = True) -> PrototypeHead:
    """Nearest class mean, with the means of all classes taken anew after every task."""
    return PrototypeHead(refresh)


def ridge_refresh(
    features: int = 1024,
    regularisation: float | None = None,
    holdout: float = 0.2,
    bits: int = 17,
    refresh: bool = True,
) -> RidgeHead:
    """Ridge on random features, with the statistics of all tasks taken anew after every task."""
    return RidgeHead(features, regularisation, holdout, bits, refresh)


def language_generated(
    read: Read = "generate", length_normalised: bool = False, rouge_l: bool = False, longest: int = LONGEST
) -> LanguageHead:
    """A language model's generated answers, compared with the label texts."""
    return LanguageHead(read, length_normalised, rouge_l, longest)


HEADS: dict[str, Callable[..., OpenedHead]] = {
    "linear": LinearHead,
    "linear_seen": linear_seen,
    "own_classifier": OwnClassifierHead,
    "label_text": LabelTextHead,
    "contrastive": ContrastiveHead,
    "language": LanguageHead,
    "language_generated": language_generated,
    "ncm": PrototypeHead,
    "ncm_refresh": ncm_refresh,
    "ridge": RidgeHead,
    "ridge_refresh": ridge_refresh,
    "lda": LDAHead,
    "klda": KLDAHead,
    "lda_ridge": LDARidgeHead,
    "closed_form": ClosedFormHead,
    "anacp": AnaCPHead,
    "ease": SubspaceHead,
    "lda_carried": lda_carried,
    "ncm_carried": ncm_carried,
    "ridge_carried": ridge_carried,
}


def make_head(head: str | Mapping[str, Any], **settings: Any) -> OpenedHead:
    """The head of this name, unopened: `make_head(head.name, **head.config())` is the same head.

    Args:
        head: a name in `HEADS`, a class name, or a mapping that holds either as `type`, beside the settings.

    Raises:
        ConfigError: neither a name nor a mapping; an unknown name or setting, or a setting of the wrong type or out
            of range.
    """
    name, written = as_written("head", head)
    settings = {**written, **settings}
    ours = {**{type(make()).__name__: make for make in reversed(HEADS.values())}, **HEADS}
    makers = with_installed(ours, name, Head)
    if name not in makers:
        raise ConfigError(f"no head is called `{name}`: {nearest(name, HEADS)}")
    parameters = inspect.signature(makers[name]).parameters.values()
    known = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]  # of torch's Module
    for setting in settings:
        if setting not in known:
            raise ConfigError(f"head `{name}` has no setting `{setting}`: {nearest(setting, known)}")
    return call_checked(f"head `{name}`", makers[name], settings)


__all__ = [
    "HEADS",
    "AnaCPHead",
    "Carried",
    "ClosedFormHead",
    "ContrastiveHead",
    "Head",
    "KLDAHead",
    "LDAHead",
    "LDARidgeHead",
    "LabelTextHead",
    "LanguageHead",
    "LinearHead",
    "OwnClassifierHead",
    "PrototypeHead",
    "RidgeHead",
    "SubspaceHead",
    "make_head",
]
