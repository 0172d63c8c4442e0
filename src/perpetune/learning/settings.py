"""One declaration of a setting: the options of the command line, the keys of a YAML file and the reference page all
follow from the fields of the configuration models."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pydantic

from ..core.paths import local_path

# how settings are grouped in `--help` and on the reference page, in this order
PANELS = ("Model", "Data", "Data without boundaries", "Recipe", "Training", "Evaluation", "Comparison", "Output")


def _possible(path: str | None) -> str | None:
    if path is not None:
        local_path(path)
    return path


PathText = Annotated[str | None, pydantic.AfterValidator(_possible)]  # of a file or folder, or of something on the Hub


@dataclass(frozen=True)
class Shortcut:
    """An option of its own for one key of a setting that is a mapping: `--epochs 3` for `--set num_train_epochs=3`."""

    key: str
    option: str
    annotation: Any
    description: str
    example: str


@dataclass(frozen=True)
class Setting:
    """One setting, as `perpetune run` and `perpetune compare` take it."""

    path: tuple[str, ...]  # keys in the YAML file: ("stream", "drift", "segments")
    option: str  # on the command line: "--drift"; empty for what a YAML file alone can say
    annotation: Any
    default: Any
    description: str
    panel: str
    example: str  # of a value, as it is written on the command line
    commands: tuple[str, ...]  # that have the option

    @property
    def name(self) -> str:
        """The key in a YAML file, with dots: `stream.drift.segments`."""
        return ".".join(self.path)

    @property
    def type(self) -> str:
        """The type in words: `whole number`, `list of text`, `class | domain | task`."""
        return _words(self.annotation)


def setting(
    default: Any,
    description: str,
    *,
    panel: str,
    option: str | None = None,
    example: str = "",
    commands: tuple[str, ...] = ("run", "compare"),
    **constraints: Any,
) -> Any:
    """The field of a configuration model, with all that its option and its place in the reference need.

    Args:
        default: the value where nothing is given; `...` where something must be.
        panel: one of `PANELS`.
        option: by default the name of the field, with dashes.
        constraints: of pydantic, for instance `gt=0`.
    """
    extra: Any = {"panel": panel, "option": option, "example": example, "commands": list(commands)}
    return pydantic.Field(default, description=description, json_schema_extra=extra, **constraints)


def settings_of(kind: type[pydantic.BaseModel], command: str | None = None) -> list[Setting]:
    """All settings of a model and of the models in its fields, panel by panel.

    Args:
        command: only those that this command has as options.
    """
    found = [s for s in _walk(kind, ()) if command is None or command in s.commands]
    return sorted(found, key=lambda s: PANELS.index(s.panel))


def bare(annotation: Any) -> Any:
    """An annotation without its None."""
    if get_origin(annotation) in (Union, types.UnionType):
        left = tuple(a for a in get_args(annotation) if a is not type(None))
        return left[0] if len(left) == 1 else Union[left]  # noqa: UP007
    return annotation


def model_in(annotation: Any) -> type[pydantic.BaseModel] | None:
    """The configuration model that a field holds, if it holds one."""
    kind = bare(annotation)
    return kind if inspect.isclass(kind) and issubclass(kind, pydantic.BaseModel) else None


def _walk(kind: type[pydantic.BaseModel], above: tuple[str, ...]) -> Iterator[Setting]:
    for name, field in kind.model_fields.items():
        path, inner = (*above, name), model_in(field.annotation)
        if inner is not None:
            yield from _walk(inner, path)
            continue
        extra: Any = field.json_schema_extra
        shared = {"panel": extra["panel"], "commands": tuple(extra["commands"])}
        for short in (m for m in field.metadata if isinstance(m, Shortcut)):
            where = (*path, short.key)
            yield Setting(
                where, short.option, short.annotation, None, short.description, example=short.example, **shared
            )
        option = (extra["option"] or f"--{name.replace('_', '-')}") if extra["commands"] else ""
        default = None if field.is_required() else field.default
        told = field.description or ""
        yield Setting(path, option, field.annotation, default, told, example=extra["example"], **shared)


def _words(annotation: Any) -> str:
    kind = bare(annotation)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(_words(a) for a in arguments)
    if origin is list:
        return f"list of {_words(arguments[0])}"
    if origin is tuple:
        return ", ".join(_words(a) for a in arguments)
    if origin is dict:
        return f"mapping of {_words(arguments[0])} to {_words(arguments[1])}"
    plain = {str: "text", int: "whole number", float: "number", bool: "yes or no", Any: "any value"}
    return plain.get(kind, getattr(kind, "__name__", str(kind)))
