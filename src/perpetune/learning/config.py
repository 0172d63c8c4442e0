"""Configuration files: validated once, here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pydantic
import yaml

from ..core.errors import ConfigError, nearest

if TYPE_CHECKING:
    from ..streams import Drift, Stream


class DriftConfig(pydantic.BaseModel):
    """The arguments of `drift`, and of the `Detector` that finds the boundaries."""

    model_config = pydantic.ConfigDict(extra="forbid")

    segments: int = 12
    length: tuple[int, int] = (150, 400)
    seed: int = 0
    level: float = pydantic.Field(default=0.001, gt=0, lt=1)
    window: int = pydantic.Field(default=64, ge=8)
    told: bool = False

    def feed(self, stream: Stream) -> Drift:
        """The examples of a stream's tasks in order, its boundaries untold.

        Raises:
            PerpetuneError: see `drift`.
        """
        from ..streams import drift

        return drift(stream, self.segments, self.length, seed=self.seed)


class StreamConfig(pydantic.BaseModel):
    """The arguments of `load_stream`; and how its tasks are fed without boundaries, if they are."""

    model_config = pydantic.ConfigDict(extra="forbid")

    source: str
    data: str | None = None
    scenario: Literal["class", "domain", "task"] | None = None
    tasks: list[str] | None = None
    name: str | None = None
    split_by: str | None = None
    classes_per_task: int | None = None
    test_share: float = 0.2
    train_limit: int | None = pydantic.Field(default=None, gt=0)
    test_limit: int | None = pydantic.Field(default=None, gt=0)
    validation_share: float = pydantic.Field(default=0.0, ge=0, lt=1)
    seed: int = 0
    order_seed: int | None = None
    columns: dict[str, str] | None = pydantic.Field(
        default=None,
        description="columns of the files and what they are here: category: label (text, text_pair, label, image, "
        "caption, prompt, response, messages)",
    )
    relabel: dict[str, str | None] | None = None
    pose: Literal["instruction", "published"] | None = None
    training: dict[str, dict[str, Any]] | None = None
    trust_remote_code: bool = False
    drift: DriftConfig | None = None

    def load(self) -> Stream:
        """The stream; with a validation share, measured on that instead of the test data.

        Raises:
            StreamError: see `load_stream`.
        """
        from ..streams import load_stream

        stream = load_stream(**self.model_dump(exclude={"drift"}))
        return stream.on_validation() if self.validation_share else stream


class RunConfig(pydantic.BaseModel):
    """One run: `perpetune run config.yaml`."""

    model_config = pydantic.ConfigDict(extra="forbid")

    model: str | None = None
    stream: StreamConfig
    recipe: str | dict[str, Any] = "lora"
    heads: list[str | dict[str, Any]] | None = None
    out: str | None = None
    seed: int = 0
    training: dict[str, Any] = {}
    pooling: Literal["mean", "cls", "last", "pooler"] | None = None
    max_length: int | None = pydantic.Field(default=None, gt=0)
    evaluate_every: int = pydantic.Field(default=1, ge=0)
    device: str | None = None
    trust_remote_code: bool = False
    imports: list[str] = []  # the user's modules, with pieces of recipes


class CompareConfig(RunConfig):
    """Several recipes and seeds on the same data: `perpetune compare config.yaml`."""

    recipes: list[str | dict[str, Any]] = []
    seeds: list[int] = [0]
    controls: bool = True
    jobs: int = pydantic.Field(default=1, ge=1)


def load_config(path: str | Path | None, kind: type[Any], overrides: dict[str, Any]) -> Any:
    """A configuration from a YAML file and the command line; the command line wins.

    Raises:
        ConfigError: the file cannot be read, or a setting is unknown or of the wrong type.
    """
    data: dict[str, Any] = {}
    if path is not None:
        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
        except FileNotFoundError as error:
            raise ConfigError(f"there is no file {path}") from error
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is no YAML: {str(error).splitlines()[0]}") from error
        if not isinstance(data, dict):
            raise ConfigError(f"{path} must hold settings (model:, stream:, recipe:, …)")
    if isinstance(data.get("stream"), str):
        data["stream"] = {"source": data["stream"]}
    stream = {**(data.get("stream") or {}), **overrides.pop("stream", {})}
    if stream.get("drift") and (data.get("stream") or {}).get("drift"):
        stream["drift"] = {**data["stream"]["drift"], **stream["drift"]}
    training = {**(data.get("training") or {}), **overrides.pop("training", {})}
    merged = {**data, **{k: v for k, v in overrides.items() if v is not None}, "stream": stream, "training": training}
    if "source" not in stream:
        raise ConfigError("no stream is given: --stream FOLDER, a built-in name, or `stream:` in the configuration")
    try:
        return kind.model_validate(merged)
    except pydantic.ValidationError as error:
        raise ConfigError(_explain(error, kind)) from error


def _explain(error: pydantic.ValidationError, kind: type[pydantic.BaseModel]) -> str:
    first = error.errors()[0]
    where = ".".join(str(p) for p in first["loc"])
    if first["type"] == "extra_forbidden":
        fields = StreamConfig.model_fields if first["loc"][0] == "stream" else kind.model_fields
        fields = DriftConfig.model_fields if first["loc"][:2] == ("stream", "drift") else fields
        return f"there is no setting `{where}`: {nearest(str(first['loc'][-1]), fields)}"
    return f"setting `{where}`: {first['msg']} (it was {first.get('input')!r})"
