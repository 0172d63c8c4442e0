"""A run that somebody else's trainer writes to: what it is, and what it has learned so far."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import ConfigError, RunError
from ..core.progress import Progress
from ..models.language_model import LanguageBackbone
from ..models.precision import Loading, quantised
from ..models.tokenizer_check import longest_text
from ..recipes import make_recipe
from ..recipes.recipe import Recipe
from ..runs.commit import Commit, active, reverted
from ..runs.config_check import check_same
from ..runs.config_file import CONFIG, read_config
from ..runs.directory import Run
from ..streams import Stream, Task
from ..streams.splitting import slug
from ..streams.tokens import SOURCE, without_rows
from .compatibility import suited
from .setup import Setup
from .training_settings import resolve_training


def named(task: str) -> str:
    """
    Raises:
        ConfigError: no name of a task.
    """
    if slug(task) != task:
        raise ConfigError(f"`{task}` is no name of a task, which is a folder's name in lower case: `{slug(task)}` is")
    return task


def earlier(path: Path) -> tuple[dict[str, Any] | None, list[Commit]]:
    """run.yaml and the commits of a run, where one is there that has learned something."""
    if not (path / CONFIG).exists():
        return None, []
    commits = Run.read(path).commits
    return (read_config(path) if len(commits) > 1 else None), commits


def recipe_of(given: str | dict[str, Any] | Recipe | None, path: Path, written: dict[str, Any] | None) -> Recipe:
    """The recipe of a run: as it was written down, or as given.

    Raises:
        ConfigError: neither.
        RunError: both, and they differ in more than heads.
    """
    made = None if given is None else make_recipe(given)
    if written is None:
        if made is None:
            raise ConfigError(f"{path} has learned nothing yet: say with which recipe, pt.Keep('olora', ...)")
        return made
    if made is None:
        return Recipe.from_dict(written["recipe"])
    aside = ("name", "heads", "training")
    old, new = ({k: v for k, v in r.items() if k not in aside} for r in (written["recipe"], made.to_dict()))
    check_same(path, {"recipe": old}, {"recipe": new})
    return made.with_heads(Recipe.from_dict(written["recipe"]).heads)


def setup_of(
    recipe: Recipe, path: Path, written: dict[str, Any] | None, backbone: LanguageBackbone, args: Any
) -> Setup:
    """What decides the run, as `Learner` would have it.

    Args:
        args: the trainer's `TrainingArguments`.

    Raises:
        RunError: the run was made with another base model.
    """
    if written is not None:
        model = {"fingerprint": written["model"]["fingerprint"]}
        check_same(path, {"model": model}, {"model": {"fingerprint": backbone.fingerprint}})
        if written["model"]["modality"] != "language":
            raise RunError(f"{path} has learned no prompts: give another run directory")
    settings = {} if written is None else dict(written["training"])
    evaluated = settings.get("per_device_eval_batch_size", args.per_device_eval_batch_size)
    return Setup(
        model=(written or {}).get("model_name") or backbone.name or None,
        recipe=suited(recipe, backbone, written is not None),
        heads_given=written is not None,
        path=path,
        training=resolve_training(recipe.training, {"per_device_eval_batch_size": evaluated}),
        loading=Loading(max_length=backbone.max_length, quantization=_quantization(backbone.model)),
        evaluate_every=1,
        seed=args.seed if written is None else written["seed"],
        device=args.device,
        progress=Progress(),
    )


def _quantization(model: Any) -> dict[str, Any] | None:
    """How the trainer's model is quantised, as `Loading` has it."""
    return model.config.quantization_config.to_dict() if quantised(model) else None


def longest_prompt(model: Any, written: dict[str, Any] | None, wanted: int | None) -> int:
    """`max_length` of a run: as it was written down; else as the trainer has it, or 512."""
    if written is not None and written["model"].get("max_length"):
        return int(written["model"]["max_length"])
    limit = longest_text(model, model.config.get_text_config(decoder=True))
    return min(wanted or 512, limit or wanted or 512)


def stream_of(
    path: Path,
    written: dict[str, Any] | None,
    commits: Sequence[Commit],
    task: Task | None,
    tests: Mapping[str, Any],
    inputs: str,
) -> Stream:
    """The tasks learned so far, without rows but for these test data, and a new one behind them.

    Raises:
        RunError: the new task has a name that was learned or taken out.
    """
    learned = commits[-1].manifest["learned"] if commits else []
    if task is not None and task.name in learned:
        raise RunError(
            f"task `{task.name}` is learned already in {path}: give this training another name, or take the task out "
            f"(perpetune revert {path} {task.name}) and learn it under a new one"
        )
    if task is not None and task.name in reverted(commits):
        raise RunError(f"task `{task.name}` was taken out of {path}: to learn it again, give it another name")
    of = {name: c for c in active(commits) for name in c.manifest.get("data", {})}
    known = [without_rows(name, of[name].manifest.get("task_classes", {}).get(name, ())) for name in learned]
    known = [replace(t, test=tests[t.name], gone=("train",)) if t.name in tests else t for t in known]
    tasks = (*known, *(() if task is None else (task,)))
    if written is not None:
        old = written["stream"]
        columns = tuple(old["inputs"])
        return Stream(old["name"], tasks, tuple(old["labels"]), old["scenario"], columns, dict(old["source"]))
    return Stream(path.name, tasks, (), "domain", (inputs,), {"source": SOURCE})


def newest_adapter(recipe: Recipe, commits: Sequence[Commit]) -> dict[str, Tensor]:
    """What the last task left, where the next one goes on with it."""
    left = active(commits) if commits else []
    return recipe.consolidation.start_of_next(left[-1]) if left else {}


def as_before(run: Run, digest: str | None) -> None:
    """
    Raises:
        RunError: another process has written to the run since it was read.
    """
    if (run.commits[-1].digest if run.commits else None) != digest:
        raise RunError(f"{run.path} has learned something else since this trainer was made: start again")


@contextmanager
def random_numbers_kept() -> Iterator[None]:
    """What is drawn in between changes nothing of what is drawn afterwards."""
    state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield
    random.setstate(state)
    np.random.set_state(numpy_state)
