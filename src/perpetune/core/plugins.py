"""What installed packages add to perpetune, under entry points in their pyproject.toml:

    [project.entry-points."perpetune.recipes"]
    pulled = "their_package.recipes:pulled"           # a function that returns a Recipe

    [project.entry-points."perpetune.pieces"]
    pull_to_start = "their_package.rules:PullToStart"  # a Rule, Head, Consolidation, Router, Tuner or PeftConfig

Nothing of theirs is imported before it is asked for by its name, or listed. To install a package is to allow its code
to run: a run directory can name an installed piece, and brings no code of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from .errors import ConfigError, first_line

PIECES = "perpetune.pieces"
RECIPES = "perpetune.recipes"


def installed(group: str) -> tuple[EntryPoint, ...]:
    """The entry points of a group, not loaded."""
    return _installed(group, tuple(sys.path))


@lru_cache(maxsize=8)
def _installed(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=group))


def package(point: EntryPoint) -> str:
    """The name of the installed package that brings an entry point."""
    return point.dist.name if point.dist is not None else point.module.partition(".")[0]


def load(point: EntryPoint) -> Any:
    """
    Raises:
        ConfigError: it cannot be imported, whatever the reason.
    """
    try:
        return point.load()
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"`{point.name}` of the package {package(point)} cannot be loaded from {point.value} "
            f"({type(error).__name__}: {first_line(error)}): mend or uninstall {package(point)}"
        ) from error


def with_installed(known: Mapping[str, Any], name: str, *bases: type, group: str = PIECES) -> Mapping[str, Any]:
    """`known`, and in it what an installed package adds under this name, if one does.

    Args:
        known: perpetune's own, by name.
        bases: an installed piece must be a class made of one of these; one of another slot is left out.

    Raises:
        ConfigError: two packages have something of this name, or it cannot be imported.
    """
    points = [point for point in installed(group) if point.name == name]
    if not points:
        return known
    owners = [*(["perpetune"] if name in known else []), *map(package, points)]
    if len(owners) > 1:
        raise ConfigError(
            f"`{name}` stands for something in {' and in '.join(owners)}: uninstall one of them, or have it renamed in "
            f"the entry points `{group}` of {owners[-1]}"
        )
    found = load(points[0])
    if bases and not (isinstance(found, type) and issubclass(found, bases)):
        return known
    return {**known, name: found}


def of_module(module: str) -> Iterator[Any]:
    """The installed pieces of the package that a module belongs to.

    Raises:
        ConfigError: one cannot be imported.
    """
    top = module.partition(".")[0]
    for point in installed(PIECES):
        if point.module.partition(".")[0] == top:
            yield load(point)
