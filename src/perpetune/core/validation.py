"""Values from files and command lines, checked against the annotations of what they are given to."""

from __future__ import annotations

import inspect
import typing
from typing import Any

import pydantic

from .errors import ConfigError


def call_checked(kind: str, target: Any, settings: dict[str, Any]) -> Any:
    """`target(**settings)` with the types of its annotations enforced.

    Raises:
        ConfigError: a value of the wrong type.
    """
    owner = target.__init__ if inspect.isclass(target) else target
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


def number(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
