"""The loop over tasks. Knows the slots, no method."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.trainer_utils import set_seed

from ..consolidation import Step
from ..core.environment import peak_memory
from ..core.errors import ConfigError
from ..core.measurement import Measurement, finite
from ..recipes.user_pieces import import_modules
from ..rules import TaskContext
from ..runs.commit import Commit, active, commit_of, reverted
from ..runs.directory import Run
from ..runs.result import BEFORE, Result
from ..streams import Stream, fingerprint
from .bout import Bout, all_due, task_seed
from .config import RunConfig
from .evaluator import choices
from .language_losses import general_loss
from .learned import Known, head_states
from .opening import filed, task_of
from .trainer import TrainingLog

UNTOUCHED = "untouched"


class Learner(Bout):
    """Learns one task after another, keeps what it promised to keep, and measures it.

    Args:
        model: hub id or folder of a transformers encoder, or of a language model for streams of prompts. Not needed by
            recipes without a network.
        recipe: a name, plain data, or a `Recipe`.
        run: run directory; started again with the same one, it resumes. None keeps the run for this object's life only.
        heads: names, `{type: name, setting: value}` or heads to read instead of the recipe's own; the first shapes the
            features.
        training: names of `transformers.TrainingArguments`, and `head_learning_rate`.
        seed: decides everything random.
        pooling, max_length, trust_remote_code: see `load_backbone`.
        evaluate_every: all tasks so far are evaluated after every so many tasks, and after the last of the stream
            (0: then alone); otherwise the task just learned and the next one. Decides nothing about what is learned.
        device: where to train and predict; None takes an accelerator where there is one.
        progress: a display; None shows nothing.

    Raises:
        ConfigError: an unknown recipe, head or training setting.

    Example:
        >>> learner = pt.Learner("google/vit-base-patch16-224-in21k", recipe="nlora", run="runs/nlora")
        >>> result = learner.learn(pt.load_stream("path/to/stream"))
        >>> print(result.summary())
    """

    @classmethod
    def from_config(cls, config: RunConfig, **instead: Any) -> Learner:
        """The learner that a configuration describes; `instead` replaces arguments of the constructor."""
        import_modules(config.imports)
        recipe = config.recipe if isinstance(config.recipe, str) else config.recipe.get("name", "custom")
        names = ("seed", "training", "heads", "pooling", "max_length", "device", "trust_remote_code", "evaluate_every")
        settings = {"recipe": config.recipe, "run": config.out or Path("runs") / recipe}
        settings |= {name: getattr(config, name) for name in names}
        return cls(config.model, **{**settings, **instead})

    # ---- the order in which things happen ----

    def learn(self, stream: Stream) -> Result:
        """Learn the tasks that the run has not learned yet.

        Raises:
            PerpetuneError: whatever is wrong, with how to mend it; every finished task is safe.
        """
        run, stream = self._open(stream)
        recipe, consolidation = self.recipe, self.recipe.consolidation
        steps = consolidation.schedule(stream)
        try:
            with self.progress:
                if not run.commits:
                    self._commit_untouched(run, stream)
                done = len(active(run.commits))
                if 0 < done < len(steps):  # as all was before what is learned next
                    learned = stream.tasks[: steps[done].first]
                    seen = {c for task in learned for c in task.classes}
                    for task in learned if self.evaluate_every == 1 and not consolidation.routed else ():
                        self._evaluator.features(task, "test", choices(stream, task, seen))
                    self._evaluator.embed(self.heads, stream.labels, [task.candidates for task in learned])
                for step in steps[done:]:
                    begun = time.perf_counter()
                    before = self._before(stream, step, steps[step.index - 1] if step.index else None)
                    started = time.perf_counter()
                    set_seed(task_seed(self.seed, step.name))
                    consolidation.begin_task(step)
                    self._examples = self._prepare(step)
                    earlier = consolidation.goes_on_from(step)
                    for head in self._all_heads():
                        if earlier is not None:
                            head.reopen(earlier)
                        head.begin_task(consolidation.classes(step))
                    context = TaskContext(
                        self._need_backbone(), _begun(run), self._batches, self._losses, self.progress.say
                    )
                    for rule in recipe.rules:
                        rule.begin_task(context)
                    log = self._train(step, len(steps))
                    measured = [m for rule in recipe.rules for m in rule.guarantee()]
                    for rule in recipe.rules:
                        rule.end_task(context)
                    self._examples = []
                    for head in self._all_heads():
                        head.end_task()
                    consolidation.end_task(step)
                    trained = time.perf_counter()
                    self._observe(step, stream)
                    due = all_due(step.index, len(steps), self.evaluate_every)
                    asked = stream.tasks[0 if due else step.first : step.learned]
                    predictions = self._evaluator.predictions(stream, step, self.heads, consolidation, asked) | before
                    measured += [*consolidation.guarantee(), *(m for head in self.heads for m in head.guarantee())]
                    measured += [*self._stale(step), *self._moved(step, stream)]
                    measured += self._spoken(run, asked)
                    commit = run.commit(step.name, self._files(predictions), self._facts(stream, step, measured))
                    evaluating = started - begun + time.perf_counter() - trained
                    self._note(run, commit, step, log, trained - started, evaluating)
        except KeyboardInterrupt:
            self.progress.say("stopped: every finished task is safe; start again with the same run directory to go on")
            raise
        finally:
            run.close()
        classes = sorted({c for s in steps for c in s.classes})
        self._predicts = Known(stream.labels, classes, stream.inputs, [task.name for task in stream])
        return Result(self.path, keep=self._temporary)

    # ---- taking a task out ----

    def revert(self, stream: Stream, task: str) -> Result:
        """Take a task out of what the run has learned, heads included: a new commit; nothing is deleted.

        The weights become the base and what the other tasks left: after `DeltaMerge`, the bits of a run in which this
        task left nothing. What heads have of the task goes as `Head.forget` says; heads with `refresh` gather anew from
        the training data of the other tasks. What rules remember stays. The task is not learned again under its name.

        Args:
            stream: with the other learned tasks, as they were; the task itself may be gone.

        Raises:
            ConfigError: no such task is learned, or tasks leave nothing that could be taken out.
            RunError: no run is there, or the other tasks are not what they were.
        """
        own, started = commit_of(Run.read(self.path).commits, task), time.perf_counter()
        consolidation, tuner = self.recipe.consolidation, self.recipe.tuner
        if not consolidation.separable(tuner):
            raise ConfigError(
                f"{type(consolidation).__name__} with {type(getattr(tuner, 'config', tuner)).__name__} keeps no change "
                "of each task by itself, so none can be taken out: use a recipe with DeltaMerge (`sotu`) or Merge "
                "(`lora`), or learn the other tasks in another run directory (--out)"
            )
        run, stream = self._open(stream, without=task)
        try:
            with self.progress:
                learned = [name for name in run.commits[-1].manifest["learned"] if name != task]
                stream = replace(stream, tasks=stream.tasks[: len(learned)])
                self._forget(run, own, stream)
                steps = self.recipe.consolidation.schedule(stream)
                step = steps[-1] if steps else None
                predictions = self._evaluator.predictions(stream, step, self.heads, self.recipe.consolidation)
                name, classes = f"revert-{task}", sorted({c for t in stream for c in t.classes})
                measured = [m for head in self.heads for m in head.guarantee()]
                measured += self._spoken(run, stream.tasks)
                facts = {
                    "reverts": task,
                    "reverted": [*reverted(run.commits), task],
                    "learned": learned,
                    "classes": classes,
                    "guarantees": [{**m.to_dict(), "task": name} for m in measured],
                    "heads": [head.name for head in self.heads],
                }
                commit = run.commit(name, self._states(predictions), facts)
                run.note(
                    "revert",
                    task=name,
                    evaluate_seconds=round(time.perf_counter() - started, 3),
                    disk_bytes=commit.size,
                )
        finally:
            run.close()
        self._predicts = Known(stream.labels, classes, stream.inputs, learned)
        return Result(self.path, keep=self._temporary)

    def _forget(self, run: Run, own: Commit, stream: Stream) -> None:
        """Heads without the task of a commit; `stream` has the tasks that remain."""
        number, position = own.manifest["index"], active(run.commits).index(own)
        before, after = head_states(run.commits[number - 1]), head_states(own)
        left = {c for task in stream for c in task.classes}
        classes = [c for c in run.commits[-1].manifest["classes"] if c not in left]
        for name, head in self._named_heads():
            if not head.refresh:
                head.forget(position, classes, before.get(name, {}), after[name])
        self._gather(stream.tasks)

    # ---- before a task ----

    def _before(self, stream: Stream, step: Step, last: Step | None) -> dict[str, Tensor]:
        """What is said of the tasks of a step before it is learned: a(j - 1, j), by the model as it is now, after the
        last step; and b_j, where the first commit lacks it."""
        own = {task.name for task in step.tasks}
        found = {k: v for k, v in self._joined.items() if task_of(k) in own}
        if last is None:
            return found
        consolidation = self.recipe.consolidation
        return found | filed(BEFORE, self._evaluator.predictions(stream, last, self.heads, consolidation, step.tasks))

    # ---- committing ----

    def _commit_untouched(self, run: Run, stream: Stream) -> None:
        predictions = self._evaluator.predictions(stream, None, self.heads, self.recipe.consolidation)
        facts: dict[str, Any] = {"learned": [], "classes": [], "guarantees": []}
        if self._speaks:
            facts["general_loss"] = general_loss(self._speaks, self._evaluator.batch_size)
        run.commit(UNTOUCHED, {"predictions.safetensors": predictions}, facts)

    def _files(self, predictions: dict[str, Tensor]) -> dict[str, Any]:
        return {**self.recipe.consolidation.files(), **self._states(predictions)}

    def _states(self, predictions: dict[str, Tensor]) -> dict[str, Any]:
        rules = {f"{i}.{k}": v for i, rule in enumerate(self.recipe.rules) for k, v in rule.state().items()}
        return {
            "head.safetensors": {
                f"{name}.{k}": v for name, head in self._named_heads() for k, v in head.state().items()
            },
            **({"rules.safetensors": rules} if rules else {}),
            "predictions.safetensors": predictions,
        }

    def _facts(self, stream: Stream, step: Step, measured: list[Measurement]) -> dict[str, Any]:
        return {
            "learned": [task.name for task in stream.tasks[: step.learned]],
            "classes": sorted({c for task in stream.tasks[: step.learned] for c in task.classes}),
            "data": {task.name: fingerprint(task) for task in step.tasks},
            "training": {task.name: dict(task.training) for task in step.tasks if task.training},
            "guarantees": [{**m.to_dict(), "task": step.name} for m in measured],
            "heads": [head.name for head in self.heads],
            "trainable_parameters": self._trainable,
        }

    def _note(self, run: Run, commit: Commit, step: Step, log: TrainingLog, training: float, rest: float) -> None:
        run.note(
            "task",
            index=step.index,
            task=step.name,
            steps=log.steps,
            first_loss=finite(log.first_loss),
            last_loss=finite(log.last_loss),
            train_seconds=round(training, 3),
            evaluate_seconds=round(rest, 3),
            peak_memory_bytes=peak_memory(self.device),
            disk_bytes=commit.size,
        )
        self.progress.say(f"{self.recipe.name}: task {step.index + 1} `{step.name}` learned in {training + rest:.1f} s")


def _begun(run: Run) -> int:
    """How many tasks rules have seen, those that were taken out again too: they remember them, and draw by number."""
    return sum("reverts" not in commit.manifest for commit in run.commits[1:])
