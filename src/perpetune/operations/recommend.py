"""Which recipe for these tasks and this model: those that make sense are tried on validation rows of the first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError
from ..core.progress import Progress
from ..learning.config import CompareConfig
from ..learning.learner import Learner
from ..metrics.records import ResultRecord, aggregate
from ..recipes import make_recipe
from ..streams import Stream
from .compare import Job, compare, jobs
from .plan import make_plan

SHARE = 0.2  # of the training rows, where no other is given
FIRST = 3  # tasks
LEVEL = 0.005  # accuracies closer than half a point are level; what is cheaper is then recommended


@dataclass(frozen=True)
class Recommendation:
    """What was tried.

    Attributes:
        recipe: the name of the best, as it was given; why: in one line.
        records: of all runs; failed: (run, error) of those that could not be made; left_out: (recipe, why not tried).
    """

    recipe: str | dict[str, Any]
    why: str
    records: list[ResultRecord]
    failed: list[tuple[str, str]]
    left_out: list[tuple[str, str]]


def candidates(stream: Stream) -> list[str]:
    """Recipes that make sense for such tasks, the cheapest first: one without training where there is one, one adapter
    for each task, where tasks share their classes one model for all, and what a run takes that names none."""
    if stream.modality == "language":
        return ["lora", "routed"]
    if stream.captions:
        return ["frozen_label_text", "lora"]
    return ["frozen_best", "lora" if stream.scenario == "domain" else "routed", "default"]


def recommend(
    config: CompareConfig,
    out: Path,
    *,
    first: int = FIRST,
    budget: float | None = None,
    progress: Progress | None = None,
) -> Recommendation:
    """Try recipes on the first tasks and compare them on rows that none of them was trained on.

    The same command goes on where an earlier one stopped. The test data is never read.

    Args:
        config: as of a comparison; its recipes, if there are any, are tried instead of `candidates`.
        first: how many tasks.
        budget: minutes that all runs together may take, by `make_plan`; those that do not fit are left out.

    Raises:
        ConfigError: a stream of one task, or without boundaries, or a budget in which nothing fits.
        PerpetuneError: no run could be made.
    """
    if config.stream.drift is not None:
        raise ConfigError("recommend is for tasks that are told: leave out --drift")
    if first < 2:
        raise ConfigError(f"--first {first}: what one task does to another shows from two tasks on")
    if budget is not None and not budget > 0:
        raise ConfigError(f"--budget {budget:g}: minutes, more than 0")
    progress = progress or Progress()
    trial = _trial(config, config.stream.load(), first)
    stream = trial.stream.load()
    todo = list(jobs(trial, stream.modality, out, stream.captions))
    kept, left_out = (trial.recipes, []) if budget is None else _affordable(trial, todo, stream, budget)
    if not kept:
        told = "; ".join(f"{name}: {why}" for name, why in left_out)
        raise ConfigError(f"nothing fits into {budget:g} minutes ({told}): give more, or fewer rows (--train-limit)")
    chosen = trial.model_copy(update={"recipes": kept})
    records, failed = compare(chosen, out, stream.modality, progress, stream.captions)
    if not records:
        raise ConfigError("no recipe could be tried: " + "; ".join(f"{name}: {error}" for name, error in failed))
    name, why = best(records)
    recipe = next(spec for spec in kept if make_recipe(spec).name == name)
    return Recommendation(recipe, why, records, failed, left_out)


def best(records: Sequence[ResultRecord]) -> tuple[str, str]:
    """The recipe with the highest final accuracy, in the scenario of the stream, and why it is taken: of level ones the
    cheaper, which stands first."""
    scenario = records[0].scenario
    figures: dict[str, float] = {}
    for entry in aggregate(records):
        if entry["scenario"] == scenario:
            name, found = entry["recipe"], entry["final_accuracy"]["mean"]
            figures[name] = max(found, figures.get(name, found))
    top = max(figures.values())
    name = next(name for name, figure in figures.items() if figure >= top - LEVEL)
    if name != max(figures, key=figures.__getitem__):
        level = f"level with {max(figures, key=figures.__getitem__)} ({100 * top:.1f}), and cheaper"
        return name, f"{100 * figures[name]:.1f} % on validation rows: {level}"
    rest = sorted((f for n, f in figures.items() if n != name), reverse=True)
    return name, f"{100 * top:.1f} % on validation rows" + (f", the next {100 * rest[0]:.1f}" if rest else "")


def _trial(config: CompareConfig, stream: Stream, first: int) -> CompareConfig:
    """The comparison that is made: first tasks, validation rows, evaluated when all are learned."""
    if len(stream) < 2:
        raise ConfigError(f"stream `{stream.name}` has one task: there is nothing to keep, use recipe lora")
    update = {
        "tasks": [task.name for task in stream.tasks[:first]],
        "validation_share": config.stream.validation_share or SHARE,
        "scenario": stream.scenario,  # of all tasks: the first ones may look like another
    }
    return config.model_copy(
        update={
            "stream": config.stream.model_copy(update=update),
            "recipes": config.recipes or candidates(stream),
            "controls": False,
            "evaluate_every": 0,
        }
    )


def _affordable(
    config: CompareConfig, todo: Sequence[Job], stream: Stream, budget: float
) -> tuple[list[Any], list[tuple[str, str]]]:
    """The recipes whose runs fit, one after the other; those that have begun are gone on with."""
    left, kept, out = 60 * budget, [], []
    for spec in config.recipes:
        name = make_recipe(spec).name
        mine = [job for job in todo if job.recipe == spec]
        if all((job.path / "run.yaml").is_file() for job in mine):
            kept.append(spec)
            continue
        job = mine[0]
        learner = Learner.from_config(config, recipe=spec, run=job.path, heads=job.heads, seed=job.seed)
        needed = len(mine) * make_plan(learner, stream).seconds
        if needed > left:
            out.append((name, f"takes about {needed / 60:.1f} min, and {left / 60:.1f} are left"))
            continue
        kept.append(spec)
        left -= needed
    return kept, out
