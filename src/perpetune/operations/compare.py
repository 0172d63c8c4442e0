"""Several recipes and seeds on the same data and step budget, with the controls that make the comparison honest."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError, PerpetuneError
from ..core.progress import Progress
from ..heads import make_head
from ..learning.config import CompareConfig
from ..metrics.accuracy import intransigence
from ..metrics.records import ResultRecord
from ..recipes import make_recipe
from ..recipes.recipe import Recipe
from ..recipes.user_pieces import import_modules

HeadSpec = str | dict[str, Any]
CONTROLS = ("sequential", "joint", "frozen_ridge")


@dataclass(frozen=True)
class Job:
    """One run of a comparison."""

    recipe: str | dict[str, Any]
    name: str
    seed: int
    heads: tuple[HeadSpec, ...] | None
    path: Path


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


def run_job(
    config: CompareConfig, job: Job, threads: int | None = None, progress: Progress | None = None
) -> list[dict]:
    """Learn the stream with one recipe, or take up where an earlier try stopped."""
    import torch

    from ..learning.learner import Learner
    from ..learning.task_free import learn

    if threads:
        torch.set_num_threads(threads)
    import_modules(config.imports)  # in a process of its own
    recipe = make_recipe(job.recipe)
    recipe.name = job.name
    learner = Learner.from_config(
        config, recipe=recipe, run=job.path, heads=job.heads, seed=job.seed, progress=progress
    )
    result = learn(learner, config.stream.load(), config.stream.drift)
    return [r.model_dump() for r in result.records()]


def compare(
    config: CompareConfig, out: Path, modality: str, progress: Progress | None = None, captions: bool = False
) -> tuple[list[ResultRecord], list[tuple[str, str]]]:
    """Run every recipe with every seed.

    Args:
        modality, captions: of the stream, which decide the controls.

    Returns:
        All records, and (run, error) for the runs that failed: one recipe that cannot run does not take the others with
        it.

    Raises:
        ConfigError: there is nothing to compare.
    """
    progress = progress or Progress()
    import_modules(config.imports)
    todo = list(jobs(config, modality, out, captions))
    if not todo:
        raise ConfigError("nothing to compare: give --recipes, for instance sequential,lora,olora")
    found: dict[Path, list[dict]] = {}
    failed: list[tuple[str, str]] = []
    with progress, progress.bar(f"{len(todo)} runs", len(todo)) as advance:
        for job, outcome in _outcomes(config, todo, progress):
            label = f"{job.name} seed {job.seed}"
            if isinstance(outcome, PerpetuneError):
                failed.append((label, str(outcome)))
                progress.say(f"{label}: {outcome}")
            else:
                found[job.path] = outcome
                progress.say(f"{label} ({job.path.name}): done")
            advance(1)
    return with_intransigence([r for job in todo for r in found.get(job.path, ())]), failed


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


def _outcomes(config: CompareConfig, todo: list[Job], progress: Progress) -> Iterator[tuple[Job, Any]]:
    if config.jobs == 1:
        for job in todo:
            try:
                yield job, run_job(config, job)
            except PerpetuneError as error:
                yield job, error
        return
    threads = threads_each(config.jobs)
    with ProcessPoolExecutor(config.jobs, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(run_job, config, job, threads): job for job in todo}
        for future in as_completed(futures):
            problem = future.exception()
            if problem is not None and not isinstance(problem, PerpetuneError):
                pool.shutdown(cancel_futures=True)
                raise problem
            yield futures[future], problem or future.result()


def threads_each(jobs: int) -> int:
    """Threads of each of several runs at a time: as many as the machine has for it, but no more than a run alone would
    take (OMP_NUM_THREADS)."""
    import torch

    return max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // jobs))
