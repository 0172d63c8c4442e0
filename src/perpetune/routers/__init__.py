"""Routers: which task does an input belong to?"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ..core.errors import ConfigError, nearest
from ..core.plugins import with_installed
from ..core.validation import as_written, call_checked
from .base import Router, RouterError
from .classes import ClassRouter
from .detector import Detector, Segment
from .kmeans import KMeansRouter
from .lda import LDARouter
from .oracle import OracleRouter
from .pooled import PooledRouter
from .ridge import RidgeRouter

ROUTERS: dict[str, type[Router]] = {
    r.__name__: r for r in (KMeansRouter, RidgeRouter, ClassRouter, LDARouter, PooledRouter, OracleRouter)
}

GONE = {"ChosenRouter": "`default` routes by LDARouter now; learn the run again into another folder"}


def make_router(router: str | dict[str, Any] | Router) -> Router:
    """A router from its name, from `{type: NAME, setting: value, ...}`, or as it is.

    Raises:
        ConfigError: neither of these; an unknown router or setting, or a setting out of range.
    """
    if isinstance(router, Router):
        return router
    name, settings = as_written("router", router)
    routers = with_installed(ROUTERS, name, Router)
    if name in GONE and name not in routers:
        raise ConfigError(f"the router `{name}` is gone: {GONE[name]}")
    if name not in routers:
        raise ConfigError(f"no router is called `{name}`: {nearest(name, routers)}")
    known = [f.name for f in fields(routers[name]) if f.init]
    for key in settings:
        if key not in known:
            raise ConfigError(f"{name} has no setting `{key}`: {nearest(key, known) if known else 'it has none'}")
    return call_checked(name, routers[name], settings)


__all__ = [
    "ROUTERS",
    "ClassRouter",
    "Detector",
    "KMeansRouter",
    "LDARouter",
    "OracleRouter",
    "PooledRouter",
    "RidgeRouter",
    "Router",
    "RouterError",
    "Segment",
    "make_router",
]
