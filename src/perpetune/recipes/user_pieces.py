"""Pieces of a user's own: what a recipe asks of them, where they come from, and how they are found again."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError, first_line
from ..core.plugins import of_module
from ..heads import Head

RESERVED = ("type", "module")  # written beside the settings


def check_fields(piece: Any) -> None:
    """Refuse a piece that could not be made again from its fields: settings would be lost without a word.

    Raises:
        ConfigError: it is no dataclass, its constructor takes something else than its fields, or a field has the name
            of what is written beside them.
    """
    kind = type(piece)
    fields = [f.name for f in dataclasses.fields(piece) if f.init] if dataclasses.is_dataclass(piece) else None
    if fields is None or set(fields) != set(inspect.signature(kind).parameters):
        raise ConfigError(
            f"{kind.__name__} takes settings that are not its fields, and so they would be lost in run.yaml: make it a "
            "dataclass (@dataclass), with a field for every setting"
        )
    _check_names(kind, fields)


def check_head(head: Head) -> None:
    """The same for a head, whose `config()` holds the settings.

    Raises:
        ConfigError: an argument of its constructor is not there, or has the name of what is written beside them.
    """
    kind, config = type(head), head.config()
    various = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)  # of torch's Module
    for name, parameter in inspect.signature(kind).parameters.items():
        if name not in {*config, *getattr(kind, "unwritten", ())} and parameter.kind not in various:
            raise ConfigError(
                f"{kind.__name__} takes `{name}`, which its config() does not tell, and so it would be lost in "
                "run.yaml: return every argument of the constructor there"
            )
    _check_names(kind, config)


def _check_names(kind: type, names: Iterable[str]) -> None:
    for name in names:
        if name in RESERVED:
            raise ConfigError(f"{kind.__name__} has a setting `{name}`, as what is written beside it: rename it")


def named(piece: Any) -> dict[str, str]:
    """How a piece is written down: its `type`, and the `module` of one that is neither ours nor peft's."""
    kind = type(piece)
    return {"type": kind.__name__} if _ours(kind) else {"type": kind.__name__, "module": home(kind)}


def home(kind: type) -> str:
    """The module that a class can be imported from; of a script that runs now, the name of its file."""
    if kind.__module__ != "__main__":
        return kind.__module__
    main: Any = sys.modules["__main__"]
    if main.__spec__ is not None:  # python -m
        return main.__spec__.name
    return Path(main.__file__).stem if getattr(main, "__file__", None) else "__main__"


def imported(candidates: Callable[[], Iterable[type]], name: str, module: str | None) -> type | None:
    """The class of this name that a user has imported, the newest if it was defined anew; or that an installed package
    names among its entry points. Nothing else is imported here: a run directory must not say what code runs.

    Args:
        candidates: classes to choose from, of those that are there now.
        module: where it is from; None takes any, and it need not be there.

    Raises:
        ConfigError: it is neither imported from this module nor among the pieces of an installed package; or those
            cannot be imported.
    """

    def found() -> list[type]:
        return [k for k in candidates() if k.__name__ == name and not _ours(k) and module in (None, home(k))]

    kinds = found()
    if not kinds and module is not None:
        for _ in of_module(module):  # imports the installed pieces of this package
            pass
        kinds = found()
    if not kinds and module is not None:
        how = f"import {module} (on the command line: --import {module})"
        raise ConfigError(
            f"this recipe has a piece of your own, `{module}.{name}`, which is not there: "
            f"{'define it' if module in sys.modules else how} first, or give the recipe itself: "
            "Learner.open(run, recipe=...)"
        )
    return kinds[-1] if kinds else None


def below(base: type[Any]) -> Iterator[type[Any]]:
    """All classes made of this one that are there now."""
    for kind in base.__subclasses__():
        yield kind
        yield from below(kind)


def _ours(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in ("perpetune", "peft")


def import_modules(names: Iterable[str]) -> None:
    """Import what the user names, and nothing else: from the current folder, behind what is installed.

    Raises:
        ConfigError: there is no such module, or it cannot be imported.
    """
    for name in names:
        if "" not in sys.path:
            sys.path.append("")
        try:
            importlib.import_module(name)
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and error.name in (name, name.partition(".")[0]):
                raise ConfigError(f"no module `{name}` is here or installed: go to the folder it is in") from error
            last = traceback.extract_tb(error.__traceback__)[-1]
            line = getattr(error, "lineno", None) or last.lineno  # a SyntaxError knows its own
            place = f"{Path(getattr(error, 'filename', None) or last.filename).name}, line {line}"
            raise ConfigError(
                f"your module `{name}` cannot be imported: {type(error).__name__}: {first_line(error)} ({place})"
            ) from error
