"""The model card of an export: what the model is, what it was made with, how good it is, and how to load it."""

from __future__ import annotations

import inspect
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..heads.readout import Readout
from ..models.backbone import Backbone
from ..models.public_name import on_hub, public_name, repository, without_places
from ..recipes import RECIPES
from ..recipes.papers import PAPERS, bibtex, papers_of_recipe
from ..runs.commit import active
from ..runs.result import Result
from .card_usage import adapters_usage, merged_usage
from .export_head import ExportedHead
from .routes import routed
from .setup import Setup
from .state import LearnerState

CARD = "README.md"
MOST_LABELS = 20  # of a task that a card spells out
CLASSIFIERS = {"SequenceClassification": "text-classification", "ImageClassification": "image-classification"}
PIPELINES = {"language": "text-generation", "text": "feature-extraction", "image": "image-feature-extraction"}


@dataclass(frozen=True)
class About:
    """What a card cannot read off the run.

    Attributes:
        usage: lines of Python that load the export from its folder.
        pipeline: what the Hub calls its use.
        adapters: what `routes.json` holds, of an export of adapters.
        command: that made the export.
        note: what a reader must know before all figures: that they are not of this choice of tasks.
    """

    usage: Sequence[str]
    pipeline: str | None
    adapters: Mapping[str, Any] | None = None
    command: str = ""
    note: str = ""


def model_card(setup: Setup, state: LearnerState, about: About) -> str:
    """The card as Markdown with a YAML head, for a folder of its own or a repository on the Hub."""
    from huggingface_hub import ModelCardData

    result, recipe, adapters = Result(setup.path), state.recipe.name, about.adapters
    model = setup.model if isinstance(setup.model, str) else None
    base = repository(model)
    source = result.config["stream"]["source"].get("source")
    tags = ["perpetune", "continual-learning", recipe, *(["lora", "peft"] if adapters else [])]
    data = ModelCardData(
        base_model=base,
        base_model_relation=("adapter" if adapters else "finetune") if base else None,
        datasets=[source] if on_hub(source) else None,
        library_name="peft" if adapters else "transformers",
        license=_license(model),
        pipeline_tag=about.pipeline,
        tags=tags,
    )
    head = yaml.safe_dump(data.to_dict(), sort_keys=False, allow_unicode=True)
    title = public_name(model).rpartition("/")[2] if model else state.backbone.name
    lines = [f"# {title}, tuned on {_count(len(result.tasks), 'task')} one after another", ""]
    lines += [f"**{about.note}**", ""] if about.note else []
    lines += [*_broken(result), *_what(state, result, adapters), *_base(model, adapters is not None)]
    lines += [*_loading(about.usage), *_data(state, result)]
    lines += [*_accuracy(result), *_promises(result), *_made(result, about.command), *_citation(recipe)]
    return f"---\n{head}---\n\n" + "\n".join(lines)


def about_merged(exported: ExportedHead, backbone: Backbone, command: str, note: str) -> About:
    """Of a plain model, with the head that it has or that lies beside it."""
    kind = type(exported.model).__name__
    pipeline = next((use for end, use in CLASSIFIERS.items() if kind.endswith(end)), PIPELINES.get(backbone.modality))
    return About(merged_usage(exported, backbone), pipeline, None, command, note)


def about_adapters(
    backbone: Backbone,
    base: tuple[str | None, str | None],
    routes: Mapping[str, Any],
    heads: Mapping[str, Readout | None],
    command: str,
    note: str,
) -> About:
    """Of adapters, and the heads that lie beside them.

    Args:
        base: where the base model is, and its GGUF file, if it is one.
    """
    usage = adapters_usage(backbone, base, routes, heads)
    return About(usage, PIPELINES.get(backbone.modality), routes, command, note)


def note_of(chosen: Mapping[str, float]) -> str:
    """Of an export of some tasks, with factors: that figures of the run are not its own."""
    parts = ", ".join(task if scale == 1 else f"{scale:g} x {task}" for task, scale in chosen.items())
    return f"This is the base model and what these tasks left: {parts}. The figures are of the run with all tasks."


# ---- the parts of a card ----


def _broken(result: Result) -> list[str]:
    """The promises that were not kept, before anything else."""
    broken = [(key, found) for key, found in result.promises().items() if not all(g["holds"] for g in found)]
    if not broken:
        return []
    lines = ["> [!CAUTION]", "> 🔴 **BROKEN PROMISE: do not use this model before you know why.**", ">"]
    for (source, name), found in broken:
        after = ", ".join(g["task"] for g in found if not g["holds"])
        lines.append(
            f"> - {source}, {name}: {_worst(found)} measured, {found[0]['bound']:.2g} promised (after {after})"
        )
    return [*lines, ""]


def _what(state: LearnerState, result: Result, adapters: Mapping[str, Any] | None) -> list[str]:
    recipe = state.recipe
    make = RECIPES.get(recipe.name)
    about = " ".join((inspect.getdoc(make) or "").split("\n\n")[0].split()) if make else "a recipe of its user's own"
    lines = [f"Made by perpetune with the recipe `{recipe.name}`: {about}", ""]
    if adapters is not None:
        lines += ["| adapter | rank | answers for | labels |", "| --- | --- | --- | --- |"]
        for each in adapters["adapters"]:
            cells = (f"`{each['name']}`", str(each["rank"]), ", ".join(each["tasks"]), _labels(each["labels"]))
            lines.append(f"| {' | '.join(map(_cell, cells))} |")
        router = adapters["router"]
        lines += ["", f"{routed(router)}.", ""] if router else [""]
    return lines


def _base(model: str | None, adapters: bool) -> list[str]:
    """What the base model is called, and what to mend where the files name a place on this machine."""
    if model is None:
        return ["The base model was in memory; the hash of its weights stands below.", ""]
    if (found := repository(model)) is not None:
        said = f"The base model is [{found}](https://huggingface.co/{found})."
    else:
        said = f"The base model is `{public_name(model)}`, which was not loaded from the Hub; its hash stands below."
    if adapters and not on_hub(model):
        said += (
            " `adapter_config.json` (`base_model_name_or_path`) and `routes.json` (`base_model`) name the copy "
            "that was used: write there what your readers can load."
        )
    return [said, ""]


def _loading(usage: Sequence[str]) -> list[str]:
    return ["## How to load it", "", "In this folder:", "", "```python", *usage, "```", ""]


def _data(state: LearnerState, result: Result) -> list[str]:
    lines = [
        "## Data",
        "",
        f"Stream `{result.config['stream']['name']}`, {result.config['stream']['scenario']}-incremental.",
    ]
    lines += ["", "| task | labels | training examples | test examples | fingerprint |", "|" + " --- |" * 5]
    for commit in active(result.commits):
        for task, fingerprint in commit.manifest.get("data", {}).items():
            classes = commit.manifest.get("task_classes", {}).get(task, ())
            labels = _labels([state.known.labels[c] for c in classes])
            sizes = commit.manifest.get("sizes", {}).get(task, {})  # which earlier runs did not note
            counts = (str(sizes.get("train", "")), str(sizes.get("test", "")))
            cells = (task, labels or "free texts", *counts, f"`{str(fingerprint)[:16]}`")
            lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return [*lines, ""]


def _accuracy(result: Result) -> list[str]:
    lines = []
    for head, scenario in result.readings:
        matrix = result.matrix(head, scenario)
        named = [f"{task} (n = {n})" for task, n in zip(matrix.tasks, matrix.test_sizes.tolist(), strict=True)]
        lines += [f"## Accuracy: head `{head}`, {scenario}-incremental", ""]
        lines += ["Mean score in percent on the test examples of every task, after each task.", ""]
        lines += [f"| after | {' | '.join(map(_cell, named))} |", "| --- |" + " --- |" * len(named)]
        for name, row in [("the untouched model", matrix.baseline), *zip(matrix.tasks, matrix.values, strict=True)]:
            until = len(row) if name not in matrix.tasks else matrix.tasks.index(name) + 1
            cells = ["" if math.isnan(x) or i >= until else f"{100 * x:.1f}" for i, x in enumerate(row)]
            if any(cells):
                lines.append(f"| {_cell(name)} | {' | '.join(cells)} |")
        lines.append("")
    return lines


def _promises(result: Result) -> list[str]:
    found = result.promises()
    if not found:
        return []
    lines = ["## What was promised, and what was measured", "", "The worst value after any task.", ""]
    lines += ["| | promise | measured | promised |", "| --- | --- | --- | --- |"]
    rows = [
        (all(g["holds"] for g in each), f"{source}: {name}", _worst(each), f"{each[0]['bound']:.2g}")
        for (source, name), each in found.items()
    ]
    for kept, *cells in sorted(rows, key=lambda row: row[0]):  # broken ones first
        lines.append(f"| {'kept' if kept else '🔴 **broken**'} | {' | '.join(map(_cell, cells))} |")
    return [*lines, ""]


def _made(result: Result, command: str) -> list[str]:
    config = result.config
    started: list[str] = next((e["command"] for e in result.journal if e["event"] == "start" and e.get("command")), [])
    name = Path(started[0]).name if started else ""
    commands = [["perpetune" if name == "__main__.py" else name, *started[1:]]] if started else []
    commands += [shlex.split(command)] if command else []
    told = [shlex.join(map(without_places, words)) for words in commands]
    lines = ["## How it was made", "", *_fenced(told, "console")]
    given = {k: v for k, v in config["training"].items() if k in ("learning_rate", "num_train_epochs", "max_steps")}
    facts = {"seed": config["seed"], **given, **config["versions"]}
    versions = ", ".join(f"{name} {value}" for name, value in facts.items())
    return [*lines, f"{versions}. The base model's weights: `{config['model']['fingerprint'][:16]}` (sha256).", ""]


def _citation(recipe: str) -> list[str]:
    numbers = [number for number in dict.fromkeys(papers_of_recipe(recipe)) if number in PAPERS]
    if not numbers:
        return []
    return ["## Citation", "", *_fenced([bibtex(number) for number in numbers], "bibtex")]


def _fenced(texts: Iterable[str], language: str) -> list[str]:
    found = list(texts)
    return [f"```{language}", *found, "```", ""] if found else []


def _labels(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - MOST_LABELS} more" if len(labels) > MOST_LABELS else ""
    return ", ".join(labels[:MOST_LABELS]) + more


def _worst(found: Sequence[Mapping[str, Any]]) -> str:
    values = [g["value"] for g in found]
    return "not a number" if None in values else f"{max(values):.2g}"


def _cell(text: str) -> str:
    """Text for a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


# ---- what is known of the base model ----


def _license(model: str | None) -> str | None:
    """The license that the base model's own card names, where the card lies here."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    if model is None:
        return None
    found: Any = Path(model) / CARD
    if not found.is_file():
        found = try_to_load_from_cache(model, CARD) if on_hub(model) else None
    if not isinstance(found, (str, Path)):
        return None
    try:
        return ModelCard.load(str(found)).data.get("license")
    except (ValueError, OSError, UnicodeDecodeError, yaml.YAMLError):  # a card of somebody else's, in any state
        return None
