"""What is measured of a language model besides right and wrong: its loss on every task, and on texts of no task."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..core.measurement import Measurement
from ..streams import Task

if TYPE_CHECKING:
    from ..models.language_model import LanguageBackbone
    from .evaluator import Evaluator
    from .state import LearnerState

SOURCE = "language model"
LOSS = "loss on the responses"


@cache
def passages() -> tuple[str, ...]:
    """Short English texts that belong to no task: prose, code, arithmetic, talk, knowledge, a recipe for bread."""
    text = (files("perpetune.learning") / "passages.txt").read_text(encoding="utf-8")
    return tuple(passage.strip() for passage in text.split("\n\n"))


def cross_entropy(responses: Tensor) -> float:
    """Nats a token of log p(response | prompt) and the numbers of tokens, (N x 2)."""
    log_p, tokens = responses.double().sum(0).tolist()
    return -log_p / tokens


def measured_language(state: LearnerState) -> bool:
    """Whether this is a language model that is one for all tasks."""
    return "answers" in state.backbone.offers and state.consolidation.states is None


def general_loss(backbone: LanguageBackbone, batch_size: int) -> float | None:
    """Cross-entropy of the second halves of the passages after their first halves, in nats a token; None for a model
    that has no room for them."""
    examples = backbone.halves(passages())
    return cross_entropy(backbone.responses(examples, batch_size)) if examples else None


def language_losses(
    state: LearnerState, tasks: Sequence[Task], untouched: float | None, whole: bool = True
) -> list[Measurement]:
    """Of a language model as it is now: its loss on the test responses of tasks that were just evaluated, and how much
    of its general ability is lost. Where each task has a state of its own, under which old tasks lose nothing, prompts
    of no task alone, see `General`.

    Args:
        untouched: `general_loss` of the model before its first task; None where it was not measured.
        whole: whether general ability is measured as well, as it is where all tasks so far are evaluated.
    """
    evaluator, backbone = state.evaluator, cast("LanguageBackbone", state.backbone)
    states, found = state.consolidation.states, list[Measurement]()
    due: Sequence[Any] = state.general if whole else ()
    if states is not None:
        return [m for general in due for m in general.measure(backbone, evaluator.batch_size, states)]
    if not measured_language(state):
        return []
    tasks = [task for task in tasks if len(task.test)]  # the data of others is gone
    classified = [task for task in tasks if task.metric is None]
    if backbone.rouge_l and classified:
        alike = {task.name: float(evaluator.features(task, "test")[:, -2].double().mean()) for task in classified}
        note = "of the mean F1 of generated answers, test examples; 1 is best"
        found.append(_mean("ROUGE-L of the answers", alike, "", note))
    if tasks:
        losses = {task.name: cross_entropy(_responses(evaluator, backbone, task)) for task in tasks}
        note = "of -log p(response | prompt), test examples, by the tokens of each task"
        found.append(_mean(LOSS, losses, "nats a token", note))
    now = None if untouched is None or not whole else general_loss(backbone, evaluator.batch_size)
    if untouched is not None and now is not None:
        note = f"on {len(passages())} short English texts; above 0: the model continues what is no task's text worse"
        name = "change of cross-entropy on texts of no task"
        found.append(Measurement(name, now - untouched, None, "nats a token", SOURCE, note))
    for general in due:
        found += general.measure(backbone, evaluator.batch_size)
    return found


def _mean(name: str, by_task: dict[str, float], unit: str, note: str) -> Measurement:
    parts = tuple((task, value, None) for task, value in by_task.items())
    note = f"mean over the tasks evaluated {note}"
    return Measurement(name, sum(by_task.values()) / len(by_task), None, unit, SOURCE, note, parts)


def _responses(evaluator: Evaluator, backbone: LanguageBackbone, task: Task) -> Tensor:
    """log p(response | prompt) and the number of its tokens of a task's test examples, (N x 2)."""
    if "options" not in backbone.reads or task.metric is not None:
        return evaluator.responses(task)
    own = torch.tensor(task.test["label"][:])[:, None]  # its likelihood is known: it was an option
    log_p = evaluator.features(task, "test").gather(1, own)
    tokens = backbone.label_embeddings(backbone.labels)[own[:, 0]]
    return torch.cat([log_p, tokens], 1)
