"""Options made from the configuration models: what is declared there is an option here, and is listed nowhere else."""

from __future__ import annotations

import inspect
import shlex
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
import yaml

from ..core.errors import ConfigError
from ..learning.config import load_config
from ..learning.settings import Setting, bare, settings_of

# of commands on a finished run
Run = Annotated[Path, typer.Argument(help="A run directory.", show_default=False)]
Model = Annotated[str | None, typer.Option(help="The base model, if it is not where it was when the run was made.")]
Import = Annotated[
    list[str] | None,
    typer.Option(
        "--import", metavar="MODULE", help="Your module with pieces of the recipe; in this folder, or installed."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

# of a gate; of `run` they stand in a panel of their own
MaxForgetting = Annotated[
    float | None, typer.Option(help="What any earlier task may lose: 0.02 is two points, the default.")
]
MinGain = Annotated[float | None, typer.Option(help="What the newest task must gain: 0.01 is one point, the default.")]
MaxFlips = Annotated[
    int | None, typer.Option(help="Examples of earlier tasks that may be wrong now and were right before.")
]
MaxLossIncrease = Annotated[
    float | None,
    typer.Option(
        metavar="NATS", help="By how much a language model's loss on any earlier task's responses may have risen."
    ),
]
MinClassAccuracy = Annotated[
    float | None, typer.Option(help="What every class of the newest task must reach: 0.5 is half of its examples.")
]

_CONFIG = inspect.Parameter(
    "config",
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    default=None,
    annotation=Annotated[
        str | None,
        typer.Argument(help="YAML file with the settings below; options win over it.", metavar="CONFIG.yaml"),
    ],
)


def configured(kind: type[Any], command: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command whose first parameter is a checked configuration of this kind: it takes a YAML file and an option for
    every setting of the model, and keeps the options that its other parameters declare."""
    settings = settings_of(kind, command)

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]

        def parsed(config: str | None = None, **given: Any) -> None:
            overrides = nested((s, given.pop(_parameter(s))) for s in settings)
            if given.get("retry") and "training" in overrides:  # settings for this task, and not for the run
                own = {given["retry"]: overrides.pop("training")}
                overrides["stream"] = {**overrides.get("stream", {}), "training": own}
            function(load_config(config, kind, overrides), **given)

        options = [
            inspect.Parameter(_parameter(s), _CONFIG.kind, default=None, annotation=_option(s)) for s in settings
        ]
        parsed.__name__, parsed.__doc__ = function.__name__, function.__doc__
        parsed.__signature__ = inspect.Signature([_CONFIG, *options, *own])  # type: ignore[attr-defined]
        return parsed

    return decorate


def nested(given: Iterable[tuple[Setting, Any]]) -> dict[str, Any]:
    """The values of the options that were given, under the keys that a YAML file has for them."""
    found: dict[str, Any] = {}
    for setting, value in given:
        read = None if value is None else value_of(setting, value)
        if read is None or read == [] or read == {}:
            continue
        place = found
        for key in setting.path[:-1]:
            place = place.setdefault(key, {})
        if isinstance(read, dict) and isinstance(place.get(setting.path[-1]), dict):
            read = {**place[setting.path[-1]], **read}  # --epochs, and --set beside it
        place[setting.path[-1]] = read
    return found


def value_of(setting: Setting, given: Any) -> Any:
    """What an option's text stands for: `A,B` a list, `NAME=VALUE` a mapping, `{name: value}` YAML.

    Raises:
        ConfigError: it is written in another way.
    """
    kind = bare(setting.annotation)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is dict:
        return _mapping(setting.option, given, arguments[1])
    if origin in (list, tuple):
        items = [item for text in given for item in _items(setting.option, text)]
        return whole_numbers(setting.option, items) if arguments[0] is int else items
    if origin in (Union, types.UnionType) and given.lstrip().startswith("{"):
        return _yaml(setting.option, given)
    return given


def make_command(kind: type[Any], command: str, config: Any, **instead: Any) -> str:
    """The command line with those settings of a configuration that are not the defaults of `kind`.

    Args:
        instead: settings of the first level that are others there.
    """
    given, settings = {**config.model_dump(exclude_unset=True), **instead}, settings_of(kind, command)
    words = ["perpetune", command]
    for setting in settings:
        value: Any = given
        for key in setting.path:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, dict):  # without what has an option of its own
            shortcuts = [s.path[-1] for s in settings if s.path[:-1] == setting.path]
            value = {k: v for k, v in value.items() if k not in shortcuts}
        if setting.option and value not in (None, {}, [], setting.default):
            words += _written(setting, value)
    return shlex.join(words)


def _written(setting: Setting, value: Any) -> list[str]:
    """An option and its value, as `value_of` reads it."""
    if isinstance(value, bool):
        return [setting.option if value else f"--no-{setting.option.removeprefix('--')}"]
    if get_origin(bare(setting.annotation)) is dict:
        return [word for key, v in value.items() for word in (setting.option, f"{key}={_plain(v)}")]
    return [setting.option, ",".join(map(_plain, value)) if isinstance(value, list | tuple) else _plain(value)]


def _plain(value: Any) -> str:
    if value is None:
        return "null"
    flow = isinstance(value, dict | list)
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).strip() if flow else str(value)


def value_of_recipe(text: str) -> Any:
    """A recipe's name, or `{name: value}` as YAML."""
    return _yaml("--recipe", text) if text.lstrip().startswith("{") else text


def whole_numbers(option: str, items: str | list[str]) -> list[int]:
    """
    Raises:
        ConfigError: something else stands there.
    """
    parts = _items(option, items) if isinstance(items, str) else items
    try:
        return [int(part) for part in parts]
    except (ValueError, TypeError):
        raise ConfigError(f"{option} takes whole numbers, 0,1,2, not `{','.join(map(str, parts))}`") from None


def imports(modules: list[str] | None) -> None:
    """Import the modules that --import names."""
    from ..recipes.user_pieces import import_modules

    import_modules(modules or ())


def _items(option: str, text: str) -> list[Any]:
    if "{" in text:
        return _yaml(option, f"[{text}]")
    return [part.strip() for part in text.split(",") if part.strip()]


def _mapping(option: str, given: list[str], values: Any) -> dict[str, Any]:
    plain = bare(values) is str  # names, which hold no commas; values of other kinds are YAML and may
    found = {}
    for text in given:
        parts = text.split(",") if plain else [text]
        for part in parts if all("=" in p for p in parts) else [text]:
            name, separator, value = part.partition("=")
            if not separator or not name.strip():
                raise ConfigError(f"{option} takes name=value, not `{part}`")
            if plain:
                absent = values is not str and value.strip() in ("", "null")
                found[name.strip()] = None if absent else value.strip()
            else:
                found[name.strip()] = _yaml(option, value)
    return found


def _yaml(option: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{option} cannot be read, `{text}`: {' '.join(str(error).split())}") from None


def _parameter(setting: Setting) -> str:
    return "__".join(setting.path)


def _option(setting: Setting) -> Any:
    kind = bare(setting.annotation)
    origin = get_origin(kind)
    plain = list[str] if origin in (list, tuple, dict) else kind if kind in (bool, int, float) else str
    if origin is Literal:
        metavar: str | None = "|".join(get_args(kind))
    else:
        metavar = {list: "A,B", tuple: "A,B", dict: "NAME=VALUE", bool: None, int: "INT", float: "NUMBER"}.get(
            origin or kind, "TEXT"
        )
    told = setting.description
    if setting.example:
        told += f" Example: `{setting.example}`."
    # an option that is not given is None, so that the file or the model decides: its default can only be told
    if setting.default not in (None, [], {}) and not isinstance(setting.default, bool):
        told += f" Default: {_text(setting.default)}."
    flag = f"{setting.option}/--no-{setting.option.removeprefix('--')}" if setting.default is True else setting.option
    option = typer.Option(flag, help=told, rich_help_panel=setting.panel, metavar=metavar, show_default=False)
    return Annotated[plain | None, option]


def _text(default: Any) -> str:
    return ",".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
