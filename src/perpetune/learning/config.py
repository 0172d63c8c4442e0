"""The settings of `perpetune run` and `perpetune compare`: declared once, here, and checked at the door.

The fields of these models are the keys of a YAML file; the options of the command line and the reference page are made
from them (`settings_of`, `settings_reference`).
"""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

import pydantic
import yaml

from ..core.errors import ConfigError, nearest
from .settings import PathText, Setting, Shortcut, bare, model_in, setting, settings_of
from .stream_config import DriftConfig, StreamConfig

__all__ = ["CompareConfig", "DriftConfig", "RunConfig", "StreamConfig", "load_config", "settings_reference"]


class RunConfig(pydantic.BaseModel):
    """One run: `perpetune run config.yaml`."""

    model_config = pydantic.ConfigDict(extra="forbid")

    model: PathText = setting(
        None,
        "Hub id or folder of an encoder (texts, images), of a pair of encoders like CLIP, or of a language model for "
        "prompts; of the latter also a .gguf file.",
        panel="Model",
        example="sentence-transformers/all-MiniLM-L6-v2",
    )
    stream: StreamConfig
    recipe: str | dict[str, Any] = setting(
        "default",
        "The method: a name (`perpetune list recipes`), or a name with settings. By default that of the run that is "
        "there, or `default`; for language models `routed`, for captions and streams whose tasks are not told `lora`.",
        panel="Recipe",
        example="'{name: nlora, rank: 4}'",
        commands=("run",),
    )
    heads: list[str | dict[str, Any]] | None = setting(
        None,
        "Heads to read predictions off with (`perpetune list heads`), instead of the recipe's own: the first shapes "
        "the features in training, the others read along.",
        panel="Recipe",
        example="linear,ridge",
    )
    out: PathText = setting(
        None,
        "Run directory; started again with the same one, the run resumes after the last whole task. By default under "
        "runs/.",
        panel="Output",
        example="runs/nlora",
    )
    seed: int = setting(0, "Decides everything random in training.", panel="Training", example="1", commands=("run",))
    training: Annotated[
        dict[str, Any],
        Shortcut("num_train_epochs", "--epochs", float, "Epochs a task.", "3"),
        Shortcut("per_device_train_batch_size", "--batch-size", int, "Training examples a step.", "32"),
        Shortcut("learning_rate", "--learning-rate", float, "Of the tuner; each recipe has its own default.", "1e-3"),
    ] = setting(
        {},
        "Any setting of transformers.TrainingArguments or of TRL's SFTConfig, head_learning_rate, class_weights "
        "(balanced, or by label), stm (a perplexity above which tokens of responses carry no loss), or sdft (tokens of "
        "an answer of the model's own, from which it learns).",
        panel="Training",
        option="--set",
        example="warmup_steps=10",
    )
    pooling: Literal["mean", "cls", "last", "pooler"] | None = setting(
        None,
        "How the features of an encoder are pooled; by default from its architecture.",
        panel="Model",
        example="cls",
    )
    max_length: int | None = setting(None, "Longest text, in tokens.", panel="Model", example="256", gt=0)
    trainer: Literal["trl", "perpetune"] | None = setting(
        None,
        "Who trains language models on prompts: TRL's SFTTrainer (trl) or a Trainer of our own (perpetune). By default "
        "trl for a new run, where TRL is installed and can train the model.",
        panel="Training",
        example="perpetune",
    )
    response_prefix: str | None = setting(
        None,
        "What stands between a prompt and its response; auto: a blank, unless the prompt ends with one. By default "
        "nothing, and auto behind prompts that --pose made.",
        panel="Model",
        example="auto",
    )
    evaluate_every: int = setting(
        1,
        "Evaluate all earlier tasks only after every so many tasks, and after the last; 0: after the last alone.",
        panel="Evaluation",
        example="5",
        ge=0,
    )
    general: PathText = setting(
        None,
        "File of prompts that belong to no task (.txt, or .jsonl with prompt or messages): how far a language model's "
        "answers to them move from the untouched model's, whenever all tasks are evaluated.",
        panel="Evaluation",
        example="general.jsonl",
    )
    lm_eval: list[str] = setting(
        [],
        "Tasks of lm-evaluation-harness, arc_easy or arc_easy:100 for its first 100 examples, or YAML files: what a "
        "language model reaches before the first task, and whenever all tasks are evaluated.",
        panel="Evaluation",
        example="arc_easy:100,hellaswag:100",
    )
    device: str | None = setting(
        None, "cpu, cuda, cuda:1 or mps; by default an accelerator where there is one.", panel="Training", example="cpu"
    )
    trust_remote_code: bool = setting(False, "Run the code that a model brings along from the Hub.", panel="Model")
    dtype: Literal["float32", "bfloat16", "float16"] | None = setting(
        None,
        "Precision of the base model, in training and evaluation; adapters and heads are float32. By default the "
        "checkpoint's own for language models (float32 for a recipe that changes the weights themselves), float32 for "
        "encoders.",
        panel="Model",
        example="bfloat16",
    )
    quantization: str | dict[str, Any] | None = setting(
        None,
        "Keep the base model in 4 or 8 bits under the adapters: nf4, fp4, int8 (bitsandbytes), or the settings of any "
        "quantization of transformers.",
        panel="Model",
        example="nf4",
    )
    gguf_file: PathText = setting(
        None, "The GGUF file of the model, in its folder or repository.", panel="Model", example="model.Q4_1.gguf"
    )
    attn_implementation: str | None = setting(
        None, "How attention is computed: eager, sdpa, flash_attention_2.", panel="Model", example="sdpa"
    )
    device_map: str | dict[str, Any] | None = setting(
        None, "Deal the model to devices as accelerate does, in place of --device.", panel="Model", example="auto"
    )
    imports: list[str] = setting(
        [],
        "Your module with pieces of the recipe, in this folder or installed; may be given again.",
        panel="Recipe",
        option="--import",
        example="my_pieces",
    )


class CompareConfig(RunConfig):
    """Several recipes and seeds on the same data: `perpetune compare config.yaml`."""

    recipes: list[str | dict[str, Any]] = setting(
        [],
        "Recipes to compare, with settings where wanted.",
        panel="Comparison",
        example="olora,nlora,lora",
        commands=("compare",),
    )
    seeds: list[int] = setting(
        [0], "Seeds; each recipe runs with each.", panel="Comparison", example="0,1,2", commands=("compare",)
    )
    controls: bool = setting(
        True,
        "Add the recipes that make a comparison honest: sequential, joint, frozen_ridge, and one without a network.",
        panel="Comparison",
        commands=("compare",),
    )
    jobs: int = setting(
        1, "Runs at a time, each in its own process.", panel="Comparison", example="2", commands=("compare",), ge=1
    )
    retries: int = setting(
        2,
        "How often a run is tried again whose process or machine is lost; it goes on after its last finished task.",
        panel="Comparison",
        example="5",
        commands=("compare",),
        ge=0,
    )
    on: Literal["processes", "ray"] = setting(
        "processes",
        "Where runs are made: in processes of this machine, or on a Ray cluster (ray).",
        panel="Comparison",
        example="ray",
        commands=("compare",),
    )
    address: str | None = setting(
        None,
        "Of the Ray cluster, as usual in Ray; by default $RAY_ADDRESS, or the cluster of this machine, or a new one.",
        panel="Comparison",
        example="auto",
        commands=("compare",),
    )
    num_cpus: float | None = setting(
        None,
        "CPUs of each run: its threads, and what Ray reserves. By default 1 on Ray; here an equal share.",
        panel="Comparison",
        example="4",
        commands=("compare",),
        gt=0,
    )
    num_gpus: float | None = setting(
        None,
        "GPUs of each run, below 1 where several share one. By default 1 where there are any.",
        panel="Comparison",
        example="0.5",
        commands=("compare",),
        ge=0,
    )


def settings_reference() -> list[Setting]:
    """Every setting of `run` and `compare`, panel by panel: what the reference page shows."""
    return settings_of(CompareConfig)


def load_config(path: str | Path | None, kind: type[Any], overrides: dict[str, Any]) -> Any:
    """A configuration from a YAML file and the command line; the command line wins.

    Args:
        kind: `RunConfig` or `CompareConfig`.
        overrides: nested like the file; mappings are joined key by key. None at the top stands for nothing given. The
            name of a recipe that the file has with settings means it with these.

    Raises:
        ConfigError: the file cannot be read, or a setting is unknown or of the wrong type.
    """
    data: Any = {}
    if path is not None:
        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
        except FileNotFoundError as error:
            raise ConfigError(f"there is no file {path}") from error
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
        if not isinstance(data, dict):
            raise ConfigError(f"{path} must hold settings (model:, stream:, recipe:, …)")
    if isinstance(data.get("stream"), str):
        data["stream"] = {"source": data["stream"]}
    merged = _merge(kind, data, {k: v for k, v in overrides.items() if v is not None} | _as_in_file(data, overrides))
    stream = merged.get("stream")
    if stream is None or (isinstance(stream, dict) and "source" not in stream):
        raise ConfigError("no stream is given: --stream FOLDER, a built-in name, or `stream:` in the configuration")
    try:
        return kind.model_validate(merged)
    except pydantic.ValidationError as error:
        raise ConfigError(_explain(error, kind)) from error


def _as_in_file(data: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """The recipes that are given by name alone, with the settings that the file has for them."""
    listed = data.get("recipes")
    known = [r for r in (data.get("recipe"), *(listed if isinstance(listed, list) else [])) if isinstance(r, dict)]

    def found(given: Any) -> list[Any]:
        return [r for r in known if isinstance(given, str) and r.get("name") == given] or [given]

    recipes = over.get("recipes")
    chosen = {"recipes": [r for given in recipes for r in found(given)]} if isinstance(recipes, list) else {}
    return chosen if over.get("recipe") is None else {**chosen, "recipe": found(over["recipe"])[0]}


def _merge(kind: type[pydantic.BaseModel], data: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`data` with `over` on top: key by key in the models and mappings of `kind`, as a whole in all else."""
    merged = dict(data)
    for key, value in over.items():
        below = merged.get(key)
        annotation = kind.model_fields[key].annotation if key in kind.model_fields else None
        inner = model_in(annotation)
        if below is None or (inner is None and get_origin(bare(annotation)) is not dict):
            merged[key] = value
        elif isinstance(below, dict):  # of another type it stays, to be refused
            merged[key] = {**below, **value} if inner is None else _merge(inner, below, value)
    return merged


def _explain(error: pydantic.ValidationError, kind: type[pydantic.BaseModel]) -> str:
    first = error.errors()[0]
    where = ".".join(str(p) for p in first["loc"])
    if first["type"] == "extra_forbidden":
        for part in first["loc"][:-1]:
            kind = model_in(kind.model_fields[str(part)].annotation) or kind
        return f"there is no setting `{where}`: {nearest(str(first['loc'][-1]), kind.model_fields)}"
    return f"setting `{where}`: {first['msg']} (it was {reprlib.repr(first.get('input'))})"
