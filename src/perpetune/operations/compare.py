"""Several recipes and seeds on the same data and step budget, with the controls that make the comparison honest."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError
from ..core.progress import Progress
from ..heads import make_head
from ..learning.config import CompareConfig
from ..metrics.accuracy import intransigence
from ..metrics.records import ResultRecord
from ..recipes import make_recipe
from ..recipes.recipe import Recipe
from ..recipes.user_pieces import import_modules
from .grid import HeadSpec, Job, Workers, attempt, in_turn, outcomes

CONTROLS = ("sequential", "joint", "frozen_ridge")


def head_groups(heads: Sequence[HeadSpec]) -> list[tuple[HeadSpec, ...]]:
    """Heads that can be read off one and the same training run: each head that trains, and with `linear` (or alone)
    those that only gather statistics and are trained by the same loss."""
    trains = [h for h in heads if make_head(h).trains]
    reads = [h for h in heads if not make_head(h).trains]
    shapes = [make_head(h).name == "linear" for h in trains]
    groups = [(h, *(reads if linear else ())) for h, linear in zip(trains, shapes, strict=True)]
    return groups if any(shapes) or not reads else [*groups, tuple(reads)]


def with_controls(
    recipes: Sequence[str | dict[str, Any]], modality: str, heads: Sequence[HeadSpec], captions: bool = False
) -> list[Any]:
    """The recipes, and the controls that are missing among them: those that can say anything of such a stream."""
    wanted = [*CONTROLS, "pixels_ridge" if modality == "image" else "tfidf_ridge"]
    if modality == "language":  # whose features no ridge can read
        wanted[wanted.index("frozen_ridge")] = "frozen_label_text"
    elif captions:  # each of an image of its own: nothing can know them that does not read them
        wanted = [*CONTROLS[:2], "frozen_label_text"]
    elif {"text": "label_text", "image": "contrastive"}[modality] in {make_head(h).name for h in heads}:
        wanted.append("frozen_label_text")
    names = {r if isinstance(r, str) else r.get("name") for r in recipes}
    return [*recipes, *(c for c in wanted if c not in names)]


def jobs(config: CompareConfig, modality: str, out: Path, captions: bool = False) -> Iterator[Job]:
    recipes = config.recipes
    if config.controls:
        recipes = with_controls(recipes, modality, config.heads or (), captions)
    seen: set[str] = set()
    for spec in recipes:
        recipe = make_recipe(spec)
        name = _unique(recipe, seen)
        groups: Sequence[tuple[HeadSpec, ...] | None] = head_groups(config.heads or ()) or [None]
        states = recipe.consolidation.states
        if not recipe.tuner.trains or (states is not None and states.blocks):
            groups = [None]  # nothing is trained, or only the recipe's own head can read what is
        for seed in config.seeds:
            for group in groups:
                yield Job(
                    spec,
                    name,
                    seed,
                    group,
                    out / name / f"seed-{seed}" / (make_head(group[0]).name if group else "own"),
                )


def _unique(recipe: Recipe, seen: set[str]) -> str:
    name, count = recipe.name, 2
    while name in seen:
        name, count = f"{recipe.name}-{count}", count + 1
    seen.add(name)
    return name


def compare(
    config: CompareConfig, out: Path, modality: str, progress: Progress | None = None, captions: bool = False
) -> tuple[list[ResultRecord], list[tuple[str, str]]]:
    """Run every recipe with every seed. Several comparisons on one folder divide the runs among them.

    Args:
        modality, captions: of the stream, which decide the controls.

    Returns:
        All records, and (run, error) for the runs that failed: one that cannot run does not take the others with it.

    Raises:
        ConfigError: there is nothing to compare, or nobody who could make the runs.
    """
    progress = progress or Progress()
    import_modules(config.imports)
    todo = list(jobs(config, modality, out, captions))
    if not todo:
        raise ConfigError("nothing to compare: give --recipes, for instance sequential,lora,olora")
    found: dict[Path, Sequence[dict]] = {}
    failed: list[tuple[str, str]] = []
    with progress, workers(config, out, progress) as made, progress.bar(f"{len(todo)} runs", len(todo)) as advance:
        for job, outcome in outcomes(made, todo, progress):
            if outcome.error:
                failed.append((job.label, outcome.error))
                if outcome.trace and os.environ.get("PERPETUNE_TRACEBACK"):
                    progress.say(outcome.trace)
            else:
                found[job.path] = outcome.records
            progress.say(f"{job.label}: {outcome.error or 'done'}")
            advance(1)
    return with_intransigence([r for job in todo for r in found.get(job.path, ())]), failed


@contextlib.contextmanager
def workers(config: CompareConfig, out: Path, progress: Progress) -> Iterator[Workers]:
    """Who makes the runs.

    Raises:
        ConfigError: settings that do not fit together, or there are no such workers.
    """
    if config.num_gpus is not None and config.num_gpus > 1 and config.num_gpus % 1:
        raise ConfigError(f"--num-gpus {config.num_gpus:g}: give a whole number, or less than 1 where runs share a GPU")
    if config.on == "ray":
        from .ray_workers import on_ray

        if config.jobs > 1:
            raise ConfigError("--jobs is for processes on this machine: on Ray say what a run takes (--num-cpus)")
        threads = max(1, int(config.num_cpus or 1))
        with on_ray(partial(attempt, config, threads), config, out, progress) as made:
            yield made
        return
    from .workers import environments, processes, run_threads

    if config.address is not None:
        raise ConfigError("--address is of a Ray cluster: add --on ray")
    if config.jobs == 1 and config.num_gpus is None:
        yield in_turn(partial(attempt, config, int(config.num_cpus) if config.num_cpus else None))
        return
    make = partial(attempt, config, run_threads(config))
    with processes(make, environments(config), config.retries, progress) as made:
        yield made


def found_records(out: Path) -> list[ResultRecord]:
    """What the runs of a comparison that was not finished have found so far; nothing where there is no such thing."""
    from ..runs.result import Result

    results = [Result(path.parent) for path in sorted(out.glob("*/seed-*/*/run.yaml"))]
    return with_intransigence([r.model_dump() for result in results if result.tasks for r in result.records()])


def with_intransigence(records: Sequence[dict[str, Any]]) -> list[ResultRecord]:
    """Records with their intransigence: how much worse a task is learned than by joint training, where that was run."""
    joint = {
        (r["seed"], r["scenario"], r["head"]): dict(zip(r["tasks"], r["matrix"][-1], strict=True))
        for r in records
        if r["recipe"] == "joint"
    }
    out = []
    for record in (ResultRecord(**r) for r in records):
        reference = joint.get((record.seed, record.scenario, record.head))
        if reference is not None and record.recipe != "joint":
            figure = intransigence(record.accuracy_matrix(), reference)
            record = record.model_copy(update={"intransigence": figure})
        out.append(record)
    return out
