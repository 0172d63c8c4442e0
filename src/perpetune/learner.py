"""The loop over tasks. Knows the slots, no method."""

from __future__ import annotations

import copy
import hashlib
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_utils import set_seed

from . import run as run_directory
from .backbone import Examples
from .config import RunConfig
from .consolidation import Step
from .errors import ConfigError, RunError, StreamError
from .evaluation import choices
from .heads import Head
from .language import LanguageBackbone
from .learned import Known, Learned, head_states
from .machine import peak_memory, versions
from .measurement import Measurement, finite
from .pieces import import_modules
from .results import BEFORE, JOINED, NO_READING, Result
from .rules import TaskContext
from .run import Commit, Run, active, commit_of, reverted
from .spoken import general_loss, spoken
from .streams import Stream, Task, fingerprint
from .training import TaskModel, TrainingLog, count_steps, resolve_training, train_task

UNTOUCHED = "untouched"


class Learner(Learned):
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
                    due = step is steps[-1] or (self.evaluate_every > 0 and (step.index + 1) % self.evaluate_every == 0)
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

        The weights become the base and what the other tasks left: after `SparseSum`, the bits of a run in which this
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
                "of each task by itself, so none can be taken out: use a recipe with SparseSum (`sotu`) or Merge "
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

    # ---- opening ----

    def _open(self, stream: Stream, without: str | None = None) -> tuple[Run, Stream]:
        """The run, and its stream: classes numbered as they have always been in this run, without the tasks that were
        taken out, or are now (`without`)."""
        if not len(stream) and without is None:
            raise StreamError(f"stream `{stream.name}` has no task")
        self.backbone, self._predicts = self._load_backbone(stream.modality), None
        self._check_heads(self.backbone, stream.captions)
        for each in stream:  # before anything is written
            own_settings(self.training, each)
        run = Run.open(self.path, self.config(stream))
        try:
            whole = stream.numbered(run_directory.read_config(self.path)["stream"]["labels"])
            out = [*reverted(run.commits), without]
            stream = replace(whole, tasks=tuple(task for task in whole if task.name not in out))
            learned = _check_learned(run, stream, without)
            done = len(active(run.commits))
            if done and done >= len(self.recipe.consolidation.schedule(stream)) and len(learned) < len(stream):
                raise RunError(
                    f"{self.path} learned all tasks of its stream at once; the stream has grown since: use another run "
                    "directory (--out)"
                )
            self._joined = self._ask_untouched(run, stream) if run.commits and without is None else {}
            self._restore(run, whole.labels, without)
            if without is None:
                run.grow(self.config(whole))
                self._note_start(run)
                for task in (task.name for task in whole if task.name in out):
                    self.progress.say(
                        f"task `{task}` was taken out of {self.path} and is passed over: to learn it again, give it "
                        "another name"
                    )
        except BaseException:
            run.close()
            raise
        return run, stream

    def config(self, stream: Stream) -> dict[str, Any]:
        """What decides the result of this run, as it is written to run.yaml."""
        backbone = self._need_backbone()
        return {
            "model_name": self.model_name,
            "model": {
                "fingerprint": backbone.fingerprint,
                "modality": backbone.modality,
                "pooling": backbone.pooling,
                "max_length": backbone.max_length,
                "trust_remote_code": self.loading["trust_remote_code"],
            },
            "stream": {
                "name": stream.name,
                "scenario": stream.scenario,
                "inputs": stream.inputs,
                "tasks": [task.name for task in stream],
                "labels": stream.labels,
                "source": stream.source,
            },
            "recipe": self.recipe.to_dict(),
            "training": self.training,
            "seed": self.seed,
            "versions": versions(),
        }

    def _ask_untouched(self, run: Run, stream: Stream) -> dict[str, Tensor]:
        """b_j of tasks that joined the stream after the first commit, where heads know classes by their names: while
        the backbone is as it was loaded, as if the run began now."""
        if not any(head.needs_label_embeddings or head.follows_texts for head in self.heads):
            return {}  # none could name a class
        asked = map(_task_of, run.commits[0].tensors("predictions.safetensors"))
        known = {*run.commits[-1].manifest["learned"], *asked}
        joined = [task for task in stream if task.name not in known]
        if not joined:
            return {}
        start = copy.copy(run)
        start.commits = []
        self._restore(start, stream.labels)
        with self.progress:
            found = self._evaluator.predictions(stream, None, self.heads, self.recipe.consolidation, joined)
        return _filed(JOINED, found)

    # ---- one step ----

    def _before(self, stream: Stream, step: Step, last: Step | None) -> dict[str, Tensor]:
        """What is said of the tasks of a step before it is learned: a(j - 1, j), by the model as it is now, after the
        last step; and b_j, where the first commit lacks it."""
        own = {task.name for task in step.tasks}
        found = {k: v for k, v in self._joined.items() if _task_of(k) in own}
        if last is None:
            return found
        consolidation = self.recipe.consolidation
        return found | _filed(BEFORE, self._evaluator.predictions(stream, last, self.heads, consolidation, step.tasks))

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
            batch = backbone.collate(self._examples[start : start + size])
            batch.pop("labels")
            yield {k: v.to(self.device) for k, v in batch.items()}

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

    # ---- committing ----

    def _commit_untouched(self, run: Run, stream: Stream) -> None:
        predictions = self._evaluator.predictions(stream, None, self.heads, self.recipe.consolidation)
        facts: dict[str, Any] = {"learned": [], "classes": [], "guarantees": []}
        if self._speaks:
            facts["general_loss"] = general_loss(self._speaks, self._evaluator.batch_size)
        run.commit(UNTOUCHED, {"predictions.safetensors": predictions}, facts)

    def _note_start(self, run: Run) -> None:
        """Journal a start, and warn where a run goes on under other versions: its bits may then differ."""
        now, then = versions(), run_directory.read_config(self.path).get("versions", {})
        run.note("resume" if run.commits else "start", command=sys.argv, versions=now, device=str(self.device))
        other = [f"{k} {then.get(k)} -> {v}" for k, v in now.items() if then.get(k) != v]
        if run.commits and other:
            self.progress.say(f"{self.path}: goes on with {', '.join(other)}; bits may differ from an undisturbed run")

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


def _task_of(key: str) -> str:
    """The task of a stored prediction."""
    return key.rpartition("/")[2]


def _filed(prefix: str, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The predictions of heads among these, under a prefix."""
    return {prefix + key: value for key, value in found.items() if not key.startswith(NO_READING)}


def _begun(run: Run) -> int:
    """How many tasks rules have seen, those that were taken out again too: they remember them, and draw by number."""
    return sum("reverts" not in commit.manifest for commit in run.commits[1:])


def _check_learned(run: Run, stream: Stream, without: str | None = None) -> list[str]:
    """A stream may have grown since; what was learned, and is not taken out, must still be what it was."""
    tasks = {task.name: task for task in stream}
    learned = [name for name in (run.commits[-1].manifest["learned"] if run.commits else ()) if name != without]
    now = [task.name for task in stream.tasks[: len(learned)]]
    if now != learned:
        raise RunError(
            f"{run.path} has learned {', '.join(learned)} in this order; the stream now starts with "
            f"{', '.join(now) or 'nothing'}: append new tasks at its end, or use another run directory (--out)"
        )
    for commit in active(run.commits):
        for name, digest in commit.manifest.get("data", {}).items():
            if name != without and fingerprint(tasks[name]) != digest:
                raise RunError(
                    f"the data of task `{name}` is not what {run.path} learned: restore it, or use another run "
                    "directory (--out)"
                )
            own = commit.manifest.get("training", {}).get(name, {})
            if name != without and own != dict(tasks[name].training):
                raise RunError(
                    f"task `{name}` was learned with training settings {own or 'of the run'} of its own, now they are "
                    f"{dict(tasks[name].training) or 'those of the run'}: restore them, or use another run directory "
                    "(--out)"
                )
    return learned


def step_budget(step: Step, training: dict[str, Any]) -> int:
    """Optimizer steps of a bout of training: the same in sum, however the tasks are dealt to bouts."""
    return sum(count_steps(len(task.train), own_settings(training, task)) for task in step.tasks)


def own_settings(training: dict[str, Any], task: Task) -> dict[str, Any]:
    """Training settings of a task, over those of the run.

    Raises:
        ConfigError: see `resolve_training`; says of which task.
    """
    try:
        return resolve_training(training, dict(task.training))
    except ConfigError as error:
        raise ConfigError(f"training of task `{task.name}`: {error}") from error


def task_seed(seed: int, task: str) -> int:
    """The seed of one task: whatever was learned before, and in whatever order, it draws the same."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{task}".encode()).digest()[:4], "little") >> 1
