"""One bout of training: its rows, its settings, what the heads gather and what is measured afterwards."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..consolidation import Step
from ..core.measurement import Measurement
from ..heads import Head
from ..models.backbone import Examples
from ..models.language_model import LanguageBackbone
from ..runs.directory import Run
from ..streams import Stream, Task
from .language_losses import spoken
from .opening import Opening, own_settings
from .trainer import TaskModel, TrainingLog, count_steps, train_task


class Bout(Opening):
    """What `Learner.learn` does for every task, piece by piece.

    Attributes:
        _examples: the rows that are trained on, while a task is learned; _trainable: how many parameters that changes.
    """

    _examples: Examples
    _trainable: int

    def _prepare(self, step: Step) -> Examples:
        """The rows that are trained on and shown to the rules, as model inputs; none where nothing looks at them."""
        trains = self.recipe.tuner.trains or self._surrogate is not None or self.heads[0].trains
        return self._need_backbone().prepare(self.recipe.consolidation.rows(step)) if trains else []

    def _settings(self, step: Step) -> dict[str, Any]:
        """Of a bout of training: those of the run, and of the task where it is one."""
        return own_settings(self.training, step.tasks[0]) if len(step.tasks) == 1 else self.training

    def _train(self, step: Step, of: int) -> TrainingLog:
        backbone, head = self._need_backbone(), self._surrogate or self.heads[0]
        self._trainable = sum(p.numel() for m in (backbone, head) for p in m.parameters() if p.requires_grad)
        if not self._trainable:
            return TrainingLog(0, None, None)
        steps = step_budget(step, self.training)
        with self.progress.bar(f"{self.recipe.name} · {step.name} ({step.index + 1}/{of}) · train", steps) as advance:
            return train_task(
                backbone,
                head,
                self.recipe.rules,
                self._examples,
                self._settings(step),
                task=step.name,
                seed=task_seed(self.seed, step.name),
                steps=steps,
                advance=advance,
            )

    def _batches(self) -> Iterable[dict[str, Tensor]]:
        backbone, size = self._need_backbone(), int(self.training["per_device_eval_batch_size"])
        for start in range(0, len(self._examples), size):
            yield backbone.batch(self._examples[start : start + size])

    def _losses(self, size: int) -> Iterable[Tensor]:
        backbone = self._need_backbone()
        model = TaskModel(backbone, self._surrogate or self.heads[0])
        for start in range(0, len(self._examples), size):
            batch = backbone.collate(self._examples[start : start + size])
            yield model(**{k: v.to(self.device) for k, v in batch.items()})["loss"]

    def _observe(self, step: Step, stream: Stream) -> None:
        """Show training samples to the heads that gather statistics, with the features as they are now."""
        self._gather(stream.tasks[: step.learned], step.tasks)

    def _gather(self, tasks: Sequence[Task], new: Sequence[Task] = ()) -> None:
        """Heads with `refresh` see all of these tasks, from nothing; the others those that are new."""
        watching = [head for head in self.heads if type(head).observe is not Head.observe]
        anew = [head for head in watching if head.refresh]
        for head in anew:
            head.clear()
        for task in tasks if anew else new if watching else ():
            features = self._evaluator.features(task, "train")
            labels = torch.tensor(task.train["label"])
            for head in watching if task in new else anew:
                head.observe(features, labels, task.train["id"])

    def _stale(self, step: Step) -> list[Measurement]:
        watching = [h for h in self.heads if type(h).observe is not Head.observe and not h.refresh]
        if not watching or not self.recipe.tuner.trains:
            return []
        note = "tasks whose class statistics were gathered with features that have changed since (order-dependent)"
        name = "tasks with stale statistics"
        return [Measurement(name, float(step.index), None, "", type(head).__name__, note) for head in watching]

    def _moved(self, step: Step, stream: Stream) -> list[Measurement]:
        """How far the features of earlier tasks' test inputs have moved: what forgetting is made of."""
        if self.evaluate_every != 1:  # how far since when would depend on where a run was stopped
            return []
        drifts = [self._evaluator.drift[task.name] for task in stream.tasks[: step.first]]
        if not drifts or not self.recipe.tuner.trains:
            return []
        note = "the task that moved most; test inputs were never shown to any rule"
        name = "change of features on earlier tasks' test inputs"
        return [Measurement(name, max(drifts), None, "relative", type(self.recipe.tuner).__name__, note)]

    def _spoken(self, run: Run, tasks: Sequence[Task]) -> list[Measurement]:
        if not self._speaks:
            return []
        return spoken(self._evaluator, self._speaks, tasks, run.commits[0].manifest.get("general_loss"))

    @property
    def _speaks(self) -> LanguageBackbone | None:
        """A language model that is one for all tasks: with a state for each, old ones lose nothing."""
        if isinstance(self.backbone, LanguageBackbone) and not self.recipe.consolidation.routed:
            return self.backbone
        return None


def all_due(index: int, of: int, every: int) -> bool:
    """Whether all tasks so far are evaluated after a step: its number, of so many, and `evaluate_every`."""
    return index == of - 1 or (every > 0 and (index + 1) % every == 0)


def step_budget(step: Step, training: dict[str, Any]) -> int:
    """Optimizer steps of a bout of training: the same in sum, however the tasks are dealt to bouts."""
    return sum(count_steps(len(task.train), own_settings(training, task)) for task in step.tasks)


def task_seed(seed: int, task: str) -> int:
    """The seed of one task: whatever was learned before, and in whatever order, it draws the same."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{task}".encode()).digest()[:4], "little") >> 1
