"""What a run will take, measured on its first steps."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from transformers.trainer_utils import set_seed

from ..core.environment import peak_memory
from ..learning.bout import all_due, step_budget
from ..learning.learner import Learner
from ..learning.trainer import train_task
from ..rules import TaskContext
from ..streams import Stream

TRIAL_STEPS = 3


@dataclass(frozen=True)
class Plan:
    """Estimates for a whole run.

    Attributes:
        trainable, total: parameters. steps: optimizer steps over all tasks.
        seconds: training and evaluation, from timing a few real steps. memory: peak bytes of the process (or
            accelerator) during them. disk_per_task: bytes a commit will hold.
    """

    recipe: str
    tasks: int
    trainable: int
    total: int
    steps: int
    seconds: float
    memory: int
    disk_per_task: int

    def text(self) -> str:
        share = f" ({100 * self.trainable / self.total:.2f} % of {self.total:,})" if self.total else ""
        return "\n".join(
            (
                f"recipe {self.recipe}, {self.tasks} tasks, {self.steps:,} steps",
                f"  trainable parameters  {self.trainable:,}{share}",
                f"  memory                {self.memory / 1e9:.1f} GB at the peak of {TRIAL_STEPS} steps",
                f"  disk                  {self.disk_per_task / 1e6:.1f} MB a task",
                f"  time                  about {max(1, round(self.seconds / 60))} min"
                if self.seconds >= 90
                else f"  time                  about {self.seconds:.0f} s",
            )
        )


def make_plan(learner: Learner, stream: Stream) -> Plan:
    """Measure a few steps of the first task; nothing of it is kept.

    Raises:
        PerpetuneError: whatever would stop the run from starting.
    """
    with tempfile.TemporaryDirectory() as folder:
        learner.path = Path(folder)
        run, stream = learner._open(stream)
        run.close()
        backbone, recipe = learner._need_backbone(), learner.recipe
        step = recipe.consolidation.schedule(stream)[0]
        set_seed(learner.seed)
        total = sum(p.numel() for p in backbone.parameters())
        recipe.consolidation.begin_task(step)
        for head in learner._all_heads():
            head.begin_task(recipe.consolidation.classes(step))
        head = learner._surrogate or learner.heads[0]
        trainable = sum(p.numel() for m in (backbone, head) for p in m.parameters() if p.requires_grad)
        size = int(learner.training["per_device_train_batch_size"])
        rows = recipe.consolidation.rows(step)
        sample = backbone.prepare(rows.select(range(min(len(rows), TRIAL_STEPS * size))))
        learner._examples = sample
        context = TaskContext(backbone, 0, learner._batches, learner._losses)
        seconds_a_step, started = 0.0, time.perf_counter()
        for rule in recipe.rules:  # a rule that finds nothing to act on says so now
            rule.begin_task(context)
        rules = time.perf_counter() - started
        if trainable:
            started = time.perf_counter()
            settings = learner._settings(step)
            train_task(backbone, head, (), sample, settings, task=step.name, seed=learner.seed, steps=TRIAL_STEPS)
            seconds_a_step = (time.perf_counter() - started) / TRIAL_STEPS
        started = time.perf_counter()
        backbone.features(sample, int(learner.training["per_device_eval_batch_size"]))
        seconds_an_example = (time.perf_counter() - started) / max(1, len(sample))
        started = time.perf_counter()
        for rule in recipe.rules if trainable else ():
            rule.end_task(context)  # so that what it remembers counts
        rules = (rules + time.perf_counter() - started) / max(1, len(sample))
        for head in learner._all_heads():
            head.end_task()
        recipe.consolidation.end_task(step)
        tensors = [t for f in learner._files({}).values() if isinstance(f, dict) for t in f.values()]
        disk = sum(t.numel() * t.element_size() for t in tensors if hasattr(t, "element_size"))
    tasks = list(stream)
    steps = sum(step_budget(s, learner.training) for s in recipe.consolidation.schedule(stream)) if trainable else 0
    trained = sum(len(t.train) for t in tasks)
    moves = recipe.tuner.trains and len(recipe.consolidation.schedule(stream)) > 1
    times = readings(len(tasks), learner.evaluate_every) if moves else [1] * len(tasks)
    read = trained + sum(len(task.test) * count for task, count in zip(tasks, times, strict=True))
    return Plan(
        recipe.name,
        len(tasks),
        trainable,
        total,
        steps,
        steps * seconds_a_step + read * seconds_an_example + trained * rules,
        peak_memory(learner.device),
        disk,
    )


def readings(tasks: int, every: int) -> list[int]:
    """How often the test data of each task is read: after its own task, and whenever all are (`evaluate_every`)."""
    return [sum(i == j or all_due(i, tasks, every) for i in range(j, tasks)) for j in range(tasks)]
