"""Scores of a language model where there are targets and nothing to generate: how likely it finds them."""

from __future__ import annotations

from contextlib import nullcontext

from torch import Tensor

from ..core.measurement import Measurement
from ..runs.result import SCORE
from ..streams import Stream
from .language_losses import LOSS, SOURCE, cross_entropy, language_losses
from .state import LearnerState

HEAD, SCENARIO = "likelihood", "domain"


def likelihoods(state: LearnerState, stream: Stream, learned: int, *, ended: bool) -> dict[str, Tensor]:
    """log p(targets) and their number for every test example (N x 2), of tasks that have some.

    Args:
        learned: how many tasks of the stream were learned before this one.
        ended: whether the newest has ended, so that it has its state where each task has one.
    """
    found, states = {}, state.consolidation.states
    for index, task in enumerate(stream):
        own = states is not None and index < learned
        if not len(task.test) or (own and not ended):  # under their own states, nothing has changed
            continue
        with states.view(index) if states is not None and ended else nullcontext():
            found[task.name] = state.backbone.responses(state.backbone.prepare(task.test), state.setup.batch_size)
    return found


def filed(scores: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """exp of the mean log p of every example's targets, as a commit stores scores."""
    means = {task: (each[:, 0] / each[:, 1].clamp(min=1)).exp() for task, each in scores.items()}
    return {f"{prefix}{SCORE}{HEAD}/{SCENARIO}/{task}": value.float() for task, value in means.items()}


def losses(
    state: LearnerState, before: dict[str, Tensor], after: dict[str, Tensor], untouched: float | None
) -> list[Measurement]:
    """The loss on the targets of each task now and before the newest one, and how much general ability is lost.

    Args:
        untouched: see `language_losses`.
    """
    notes = {
        LOSS: ("of -log p(target | what stands before it), the trainer's eval_dataset", after),
        f"{LOSS}, before this task": ("the same of the model before", before),
    }
    found = []
    for name, (note, scores) in notes.items():
        parts = tuple((task, cross_entropy(each), None) for task, each in scores.items())
        if parts:
            mean = sum(value for _, value, _ in parts) / len(parts)
            found.append(Measurement(name, mean, None, "nats a token", SOURCE, f"mean over tasks {note}", parts))
    return [*found, *language_losses(state, (), untouched)]
