"""Values from files and command lines, checked against the annotations of what they are given to."""

from __future__ import annotations

import dataclasses
import inspect
import reprlib
import typing
from collections.abc import Mapping
from typing import Any

import pydantic

from .errors import ConfigError


def call_checked(kind: str, target: Any, settings: dict[str, Any]) -> Any:
    """`target(**settings)` with the types of its annotations enforced.

    Raises:
        ConfigError: a value of the wrong type.
    """
    # of a dataclass the class: a field that it inherits is annotated in the words of another module
    bare = dataclasses.is_dataclass(target) or not inspect.isclass(target)
    owner = target if bare else target.__init__
    try:
        hints = typing.get_type_hints(owner)
    except NameError:
        hints = {}
    checked = {}
    for key, value in settings.items():
        try:
            checked[key] = pydantic.TypeAdapter(hints[key]).validate_python(value) if key in hints else value
        except pydantic.ValidationError as error:
            raise ConfigError(f"{kind}: `{key}` = {value!r}: {error.errors()[0]['msg']}") from error
    return target(**checked)


def as_written(slot: str, data: Any) -> tuple[str, dict[str, Any]]:
    """Name and settings of a piece, which is written as its name, or as `{type: NAME, setting: value, ...}`.

    Raises:
        ConfigError: it is written as something else.
    """
    given = {"type": data} if isinstance(data, str) else data
    if not isinstance(given, Mapping) or not isinstance(given.get("type"), str):
        raise ConfigError(
            f"a {slot} is written as its name, or as {{type: NAME, setting: value, ...}}, not {reprlib.repr(data)}"
        )
    return given["type"], {key: value for key, value in given.items() if key != "type"}


def number(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
