"""One session of training: its rows, its settings, and what heads gather afterwards."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..consolidation import Session
from ..core.processes import launched, rank
from ..heads.trained import TrainedHead
from ..models.backbone import Examples
from ..models.language_model import LanguageBackbone
from ..models.prompt_examples import cut_line
from ..runs.directory import Run
from ..streams import Task
from .checkpoints import Checkpoints, key_of, saving
from .class_weights import SETTING, class_weights
from .loss_log import FILE, LossLog, logging_steps
from .self_distillation import SDFT, demonstrated
from .setup import task_settings
from .state import LearnerState
from .token_masking import STM, mask_tokens
from .trainer import TaskModel, TrainingLog, train_task
from .trainer_choice import OLD
from .training_settings import REPORTING, count_steps
from .trl_training import packed_count


class Training:
    """Trains a state on the rows of a session.

    Attributes:
        examples: the rows as model inputs, while the session lasts; none where nothing reads them.
        trainable: number of parameters that training changes.
        learns: whether there is anything to train: the model, or a head that is read.
    """

    def __init__(self, state: LearnerState, session: Session) -> None:
        self.state, self.session = state, session
        adapts = state.recipe.tuner.trains and state.consolidation.adapts(session)
        self.learns = adapts or state.heads[0].trains
        self.examples: Examples = self._prepared() if self.learns else []
        self.trainable = 0

    def _prepared(self) -> Examples:
        state, settings = self.state, self.state.setup.training_of(self.session.tasks)
        rows = state.consolidation.rows(self.session)
        if not isinstance(state.backbone, LanguageBackbone):
            return state.backbone.prepare(rows)
        found = state.backbone.prepare(rows, all_turns=bool(settings.get("assistant_only_loss")))
        if said := cut_line(self.session.name, found, state.backbone.room):
            state.setup.progress.say(said)
        if longest := settings.get(SDFT):
            shown = demonstrated(state.backbone, rows, longest)
            found = [{**e, "shown": tokens} for e, tokens in zip(found, shown, strict=True)]
        if (threshold := settings.get(STM)) is not None:
            state.setup.progress.say(mask_tokens(state, self.session.name, found, threshold))
        return found

    def open_heads(self) -> None:
        consolidation, states = self.state.consolidation, self.state.consolidation.states
        earlier = states.goes_on_from(self.session) if states else None
        for head in self.state.all_heads():
            if earlier is not None:
                head.reopen(earlier)
            head.begin_task(consolidation.classes(self.session))
        trained = self.state.training_head
        if weights := self.state.setup.training_of(self.session.tasks).get(SETTING):
            drawn = consolidation.rows(self.session)["label"][:]
            trained.weigh(class_weights(weights, drawn, self.state.known.labels))
        if self.learns and isinstance(trained, TrainedHead) and trained.contrasts and len(trained.task_classes) == 1:
            self._tell_one(trained)

    def _tell_one(self, head: TrainedHead) -> None:
        """A session of one class: what it is told from, if there is anything yet."""
        self.examples = self.state.backbone.contrasted(self.examples, head.in_loss)
        if len(head.in_loss) == 1:
            self.state.setup.progress.say(
                f"task `{self.session.name}` has one class, `{head.labels[head.in_loss[0]]}`, and there is no other to "
                "tell it from: its loss is 0, and this class is predicted until a task brings another"
            )

    def steps(self, limit: int | None = None) -> int:
        """Optimizer steps, `limit` at most."""
        setup, settings = self.state.setup, self.state.setup.training_of(self.session.tasks)
        steps = step_budget(self.session, setup.training)
        if settings.get("packing"):  # an epoch has fewer rows
            count = packed_count(self.state.backbone, self.examples, settings.get("packing_strategy", "bfd"))
            steps = min(steps, count_steps(count, settings))
        return steps if limit is None else min(steps, limit)

    def checkpoints(self, run: Run, steps: int) -> Checkpoints | None:
        """Those inside this task, the newest one found and given to the rules; None where none are kept."""
        state, settings = self.state, self.state.setup.training_of(self.session.tasks)
        if not self.learns or saving(settings)["save_strategy"] == "no":
            return None
        key = key_of(run, self.session, settings, steps, REPORTING)
        found = Checkpoints(run, self.session.name, key, state.recipe.rules)
        found.look(state.known.tasks, state.setup.progress)
        return found

    def train(self, of: int, steps: int, checkpoints: Checkpoints | None = None) -> TrainingLog:
        """
        Args:
            of: number of sessions of the run, for the display.
        """
        state, session = self.state, self.session
        setup, backbone, head = state.setup, state.backbone, state.training_head
        self.trainable = sum(p.numel() for m in (backbone, head) for p in m.parameters() if p.requires_grad)
        if not self.trainable or not self.learns:
            self.trainable = 0
            return TrainingLog(0, None, None)
        settings = setup.training_of(session.tasks)
        title = f"{state.recipe.name} · {session.name} ({session.index + 1}/{of}) · train"
        with setup.progress.bar(title, steps) as advance:
            return train_task(
                backbone,
                head,
                state.recipe.rules,
                self.examples,
                {"logging_steps": logging_steps(steps), **settings},
                task=session.name,
                seed=task_seed(setup.seed, session.name),
                steps=steps,
                advance=advance,
                logs=setup.path / "logs" / session.name,
                callbacks=[LossLog(session.name, setup.path / FILE, setup.progress.note)],
                by=setup.trainer or OLD,
                checkpoints=checkpoints,
            )

    def close_heads(self) -> None:
        self.examples = []
        for head in self.state.all_heads():
            head.end_task()

    def batches(self) -> Iterable[dict[str, Tensor]]:
        """The session's rows as model inputs, for rules."""
        backbone, size = self.state.backbone, self.state.setup.batch_size
        for start in range(0, len(self.examples), size):
            yield backbone.batch(self.examples[start : start + size])

    def losses(self, size: int) -> Iterable[Tensor]:
        """The training loss of batches of `size` rows, with a graph, for rules; of several processes each has its
        part."""
        backbone = self.state.backbone
        model = TaskModel(backbone, self.state.training_head)
        for start in range(rank() * size, len(self.examples), launched() * size):
            batch = backbone.collate(self.examples[start : start + size])
            yield model(**{k: v.to(self.state.setup.device) for k, v in batch.items()})["loss"]


def features_before(state: LearnerState, session: Session) -> Tensor | None:
    """What heads read of a session's training samples before it is learned, (N x width), for those that carry their
    statistics along; None where there is none, or nothing to carry."""
    if not session.index or not any(head.carries for head in state.heads):
        return None
    return torch.cat([state.evaluator.observed(task, state.consolidation.states) for task in session.tasks])


def gather(state: LearnerState, tasks: Sequence[Task], new: Sequence[Task] = (), before: Tensor | None = None) -> None:
    """Show training samples to heads that gather statistics, with the features as they are now: all of these tasks,
    from nothing, to heads with `refresh`; those that are new to the others.

    Args:
        before: what `features_before` gave of the new ones.
    """
    observing = [head for head in state.heads if head.observes]
    anew = [head for head in observing if head.refresh]
    for head in anew:
        head.clear()
    if before is not None:
        after = torch.cat([state.evaluator.observed(task, state.consolidation.states) for task in new])
        for head in state.heads:
            if head.carries:
                head.carry(before, after)
    for task in tasks if anew else new if observing else ():
        features = state.evaluator.observed(task, state.consolidation.states)
        labels, ids = torch.tensor(task.train["label"][:]), task.train["id"][:]
        for head in observing if task in new else anew:
            head.observe(features, labels, ids)


def step_budget(session: Session, training: dict[str, Any]) -> int:
    """Optimizer steps of a session: the same in sum, however the tasks are dealt to sessions."""
    return sum(count_steps(len(task.train), task_settings(training, task)) for task in session.tasks)


def task_seed(seed: int, task: str) -> int:
    """The seed of one task: whatever was learned before, and in whatever order, it draws the same."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{task}".encode()).digest()[:4], "little") >> 1
