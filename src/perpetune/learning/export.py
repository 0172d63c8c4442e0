"""A plain model: which tasks it is composed of, what that is worth, and its files without adapters around them."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..consolidation import Consolidation
from ..core.errors import ConfigError, ModelError, nearest
from ..core.files import write_text
from ..heads import LinearHead
from ..models.backbone import Backbone
from ..models.language_loading import quiet
from ..models.precision import reduced
from ..runs.commit import active
from ..runs.directory import Run, write_folder
from .export_head import FILES, ExportedHead, chosen_head, with_head, write_beside
from .model_card import CARD, about_merged, model_card, note_of
from .setup import Setup
from .state import LearnerState

if TYPE_CHECKING:
    from ..recipes.recipe import Recipe
    from ..runs.result import Result

FORMATS = ("merged", "adapters")


@dataclass(frozen=True)
class Choice:
    """What is exported, and how; see `Learner.export`.

    Attributes:
        command: that makes the export, for its card.
    """

    only: Sequence[str] | None = None
    without: Collection[str] = ()
    scales: Mapping[str, float] | None = None
    dtype: str = "float32"
    head: bool | str = True
    format: str = "merged"
    cumulative: bool = False
    command: str = ""

    @property
    def everything(self) -> bool:
        return self.only is None and not self.without and not self.scales

    def of(self, learned: Sequence[str]) -> dict[str, float]:
        """See `choose`."""
        return choose(learned, self.only, self.without, self.scales)


def export(setup: Setup, state: LearnerState, folder: Path, choice: Choice) -> tuple[Path, str]:
    """See `Learner.export`; also what became of the head, in words."""
    backbone = state.backbone
    if not backbone.network:
        raise ConfigError(f"recipe `{state.recipe.name}` has no network to export")
    if choice.dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"dtype is float32 or bfloat16, not `{choice.dtype}`")
    commits = Run.read(setup.path).commits
    if not commits:
        raise ConfigError("nothing is learned yet: call learn(stream) first")
    if choice.format not in FORMATS or (choice.cumulative and choice.format == "merged"):
        raise ConfigError(f"format is {' or '.join(FORMATS)}, not `{choice.format}`; cumulative goes with adapters")
    if isinstance(choice.head, str):
        chosen_head(state, choice.head)
    if choice.format == "adapters":
        from .export_adapters import export_adapters  # which composes as is done here

        return export_adapters(setup, state, folder, choice)
    everything, chosen = choice.everything, {}
    if everything and state.consolidation.states is None and not reduced(backbone.model):
        model: Any = plain(copy.deepcopy(backbone.model), commits[-1].path)
    elif everything and state.consolidation.states is None:
        backbone, consolidation = fresh(setup, state)
        consolidation.restore(active(commits))
        model = plain(backbone.model, commits[-1].path)
    else:
        chosen = choice.of(commits[-1].manifest["learned"])
        backbone, consolidation = fresh(setup, state)
        by_task = {c.manifest["task"]: c for c in active(commits)}
        consolidation.compose(by_task, chosen)
        model = plain(backbone.model, by_task[list(chosen)[-1]].path if chosen else commits[-1].path)
    if not choice.head:
        exported = ExportedHead(model, False, "without its head")
    elif everything:
        exported = with_head(state, model, choice.head)
    else:
        exported = ExportedHead(model, False, "its head reads the features of all tasks, and stays in the run")
    note = note_of(chosen) if chosen else ""
    saved: Any = exported.model.to(dtype=getattr(torch, choice.dtype))

    def write(aside: Path) -> None:
        with quiet():
            saved.save_pretrained(str(aside))
        backbone.save_processors(str(aside))
        if exported.beside and exported.readout is not None:
            write_beside(aside, exported.readout, exported.labels, backbone)
        write_text(aside / CARD, model_card(setup, state, about_merged(exported, backbone, choice.command, note)))

    write_folder(folder, write)
    old = not exported.beside and (folder / FILES[1]).exists()
    for name in FILES if old else ():  # of an earlier export
        (folder / name).unlink(missing_ok=True)
    return folder, exported.told


def fresh(setup: Setup, state: LearnerState) -> tuple[Backbone, Consolidation]:
    """The base model once more, untouched, and the recipe's consolidation over it, nothing restored yet. In fp32, where
    the run reads it quantised or in half precision: what is merged into it is not rounded.

    Raises:
        RunError: the base model is another one now.
        ModelError: a quantised model that its quantization does not let dequantise.
    """
    recipe = copy.deepcopy(setup.recipe)
    if reduced(state.backbone.model):
        base = setup.load_whole(state.backbone.modality)
    else:
        base = setup.load_base(state.backbone.modality, state.backbone.fingerprint)
    recipe.consolidation.open(base, recipe.tuner, state.known.labels)
    return base, recipe.consolidation


def choose(
    learned: Sequence[str],
    only: Sequence[str] | None = None,
    without: Collection[str] = (),
    scales: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """The factor of every chosen task, in the order of learning.

    Args:
        learned: tasks there are.
        only: tasks to take; None takes all.
        without: tasks to leave out.
        scales: factors other than 1.

    Raises:
        ConfigError: an unknown task, contradicting choices, no task left, or a factor that is 0 or not finite.
    """
    scales = dict(scales or {})
    for task in (*(only or ()), *without, *scales):
        if task not in learned:
            raise ConfigError(f"this run has learned no task `{task}`: {nearest(task, learned)}")
    if only is not None and without:
        raise ConfigError("`only` says what to take and `without` what to leave out: give one of them")
    chosen = [t for t in learned if t not in without and (only is None or t in only)]
    if not chosen:
        raise ConfigError("no task is left, and that is the base model itself: choose at least one task")
    for task, scale in scales.items():
        if task not in chosen:
            raise ConfigError(f"task `{task}` is left out and has a scale: take one of them away")
        if not math.isfinite(scale) or scale == 0:
            raise ConfigError(
                f"the scale of `{task}` must be a number other than 0, not {scale}: to leave it out, say so"
            )
    return {task: float(scales.get(task, 1.0)) for task in chosen}


def ties(recipe: Recipe, result: Result) -> str | None:
    """What tied the deltas of this run's tasks together in training; None where each was made from the base alone.

    A delta that was made with a part of another task in sight does not forget that task when the task is left out.
    """
    head: Any = recipe.heads[0] if recipe.heads[0].trains else recipe.heads[0].trainer()
    if recipe.tuner.trains and not recipe.consolidation.independent:
        return "each was trained on top of those before it"
    if recipe.rules:
        names = ", ".join(type(rule).__name__ for rule in recipe.rules)
        return f"the rules ({names}) carry over from task to task"
    if getattr(head, "loss_over", "current") == "seen":
        return "the head that trained them saw the classes of earlier tasks"
    _, targets = result.predictions(*result.readings[0])
    shared = any(set(a.tolist()) & set(b.tolist()) for a, b in combinations(targets.values(), 2))
    if shared and isinstance(head, LinearHead):
        return "tasks share classes, and the head that trained them carries their rows over"
    return None


def stale(recipe: Recipe, result: Result, task: str) -> str | None:
    """What ties a task to heads when it is taken out: statistics of later tasks, gathered with features that it had
    shaped; None where there are none."""
    if task == result.tasks[-1] or not recipe.tuner.trains or recipe.consolidation.states is not None:
        return None
    names = [h.name for h in recipe.heads if h.observes and not h.refresh]
    if not names:
        return None
    return f"{' and '.join(names)} gathered later tasks with features that it had shaped (refresh gathers anew)"


def plain(model: Any, folder: Path) -> nn.Module:
    """The transformers model with its adapters merged into the weights, in place.

    Args:
        folder: where the adapter is stored, for the message.

    Raises:
        ConfigError: no weights could hold this adapter.
    """
    if not hasattr(model, "peft_config"):
        return model
    try:
        return model.merge_and_unload(safe_merge=True)
    except (ModelError, AttributeError, NotImplementedError, ValueError) as error:
        if "NaN" in str(error):
            raise ConfigError(
                f"the adapter in {folder} holds numbers that are not finite, and nothing can be merged: take the task "
                "out (perpetune revert), and learn it again with a lower learning_rate"
            ) from error
        reason = str(error).splitlines()[0].split(":")[0] if isinstance(error, ModelError) else "peft cannot merge it"
        kind = type(next(iter(model.peft_config.values()))).__name__
        raise ConfigError(
            f"there is no plain model of a {kind} run ({reason}): load its adapter onto the base model with "
            f"perpetune.load_adapter(model, {str(folder)!r})"
        ) from error
