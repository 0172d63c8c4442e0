"""The loop over tasks. Knows the slots, no method."""

from __future__ import annotations

import copy
import hashlib
import sys
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from torch import Tensor
from transformers.trainer_utils import set_seed

from . import run as run_directory
from .backbone import Backbone, Examples, FixedFeatures, Pooling, load_backbone
from .compose import choose, plain
from .config import RunConfig
from .consolidation import Consolidation, Step
from .errors import ConfigError, RunError, StreamError, nearest
from .evaluation import Evaluator
from .heads import Head, make_head
from .machine import default_device, peak_memory, versions
from .measurement import Measurement, finite
from .progress import Progress
from .recipe import Recipe
from .recipes import make_recipe
from .results import Result
from .rules import TaskContext
from .run import Commit, Run
from .streams import Stream, fingerprint
from .training import TaskModel, TrainingLog, count_steps, resolve_training, train_task
from .tuners import NoNetwork

UNTOUCHED = "untouched"


class Learner:
    """Learns one task after another, keeps what it promised to keep, and measures it.

    Args:
        model: hub id or folder of a transformers encoder. Not needed by recipes without a network.
        recipe: a name, plain data, or a `Recipe`.
        run: run directory; started again with the same one, it resumes. None keeps the run for this object's life only.
        heads: names, `{type: name, setting: value}` or heads to read instead of the recipe's own; the first shapes the
            features.
        training: names of `transformers.TrainingArguments`, and `head_learning_rate`.
        seed: decides everything random.
        pooling, max_length, trust_remote_code: see `load_backbone`.
        device: where to train and predict; None takes an accelerator where there is one.
        progress: a display; None shows nothing.

    Raises:
        ConfigError: an unknown recipe, head or training setting.

    Example:
        >>> learner = pt.Learner("google/vit-base-patch16-224-in21k", recipe="nlora", run="runs/nlora")
        >>> result = learner.learn(pt.load_stream("path/to/stream"))
        >>> print(result.summary())
    """

    def __init__(
        self,
        model: str | Path | None,
        recipe: str | dict[str, Any] | Recipe = "lora",
        run: str | Path | None = None,
        *,
        heads: Sequence[str | dict[str, Any] | Head] | None = None,
        training: dict[str, Any] | None = None,
        seed: int = 0,
        pooling: Pooling | None = None,
        max_length: int | None = None,
        trust_remote_code: bool = False,
        device: str | torch.device | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._recipe = make_recipe(recipe)
        if heads:
            self._recipe = self._recipe.with_heads([h if isinstance(h, Head) else make_head(h) for h in heads])
        self.recipe = copy.deepcopy(self._recipe)
        self.model_name = str(model) if model is not None else None
        self.training = resolve_training(self.recipe.training, training or {})
        self.seed = seed
        self.loading: dict[str, Any] = {
            "pooling": pooling,
            "max_length": max_length,
            "trust_remote_code": trust_remote_code,
        }
        self.device = torch.device(device) if device is not None else default_device()
        self.progress = progress or Progress()
        self._temporary = tempfile.TemporaryDirectory() if run is None else None
        self.path = Path(self._temporary.name if self._temporary else run)  # type: ignore[arg-type]
        self.backbone: Backbone | None = None
        self.heads = self.recipe.heads
        self._surrogate: Head | None = None
        self._examples: Examples = []
        self._trainable = 0
        self._predicts: tuple[Sequence[str], Sequence[int], Sequence[str]] | None = None

    @classmethod
    def from_config(cls, config: RunConfig, **instead: Any) -> Learner:
        """The learner that a configuration describes; `instead` replaces arguments of the constructor."""
        recipe = config.recipe if isinstance(config.recipe, str) else config.recipe.get("name", "custom")
        names = ("seed", "training", "heads", "pooling", "max_length", "device", "trust_remote_code")
        settings = {"recipe": config.recipe, "run": config.out or Path("runs") / recipe}
        settings |= {name: getattr(config, name) for name in names}
        return cls(config.model, **{**settings, **instead})

    # ---- the order in which things happen ----

    def learn(self, stream: Stream) -> Result:
        """Learn the tasks that the run has not learned yet.

        Raises:
            PerpetuneError: whatever is wrong, with how to mend it; every finished task is safe.
        """
        run = self._open(stream)
        recipe, consolidation = self.recipe, self.recipe.consolidation
        steps = consolidation.schedule(stream)
        try:
            with self.progress:
                if not run.commits:
                    self._commit_untouched(run, stream)
                done = len(run.commits) - 1
                for task in stream.tasks[: steps[done].first] if 0 < done < len(steps) else ():
                    self._evaluator.features(task, "test")  # as they were before what is learned next
                for step in steps[done:]:
                    started = time.perf_counter()
                    set_seed(task_seed(self.seed, step.index))
                    consolidation.begin_task(step)
                    self._examples = self._prepare(step)
                    for head in self._all_heads():
                        head.begin_task(consolidation.classes(step))
                    context = TaskContext(self._need_backbone(), step.index, self._batches, self._losses)
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
                    predictions = self._evaluator.predictions(stream, step, self.heads, consolidation)
                    measured += [*consolidation.guarantee(), *(m for head in self.heads for m in head.guarantee())]
                    measured += [*self._stale(step), *self._moved(step, stream)]
                    commit = run.commit(step.name, self._files(predictions), self._facts(stream, step, measured))
                    self._note(run, commit, step, log, trained - started, time.perf_counter() - trained)
        except KeyboardInterrupt:
            self.progress.say("stopped: every finished task is safe; start again with the same run directory to go on")
            raise
        finally:
            run.close()
        self._predicts = (stream.labels, sorted({c for s in steps for c in s.classes}), stream.inputs)
        return Result(self.path, keep=self._temporary)

    # ---- opening ----

    def _open(self, stream: Stream) -> Run:
        if not len(stream):
            raise StreamError(f"stream `{stream.name}` has no task")
        self.backbone = self._load_backbone(stream.modality)
        run = Run.open(self.path, self.config(stream))
        try:
            self._restore(run, stream.labels)
            _check_learned(run, stream)
            learned = run.commits[-1].manifest["learned"] if run.commits else []
            if len(run.commits) > len(self.recipe.consolidation.schedule(stream)) and len(learned) < len(stream):
                raise RunError(
                    f"{self.path} learned all tasks of its stream at once; the stream has grown since: use another run "
                    "directory (--out)"
                )
            run.grow(self.config(stream))
            self._note_start(run)
        except BaseException:
            run.close()
            raise
        return run

    def _load_backbone(self, modality: Any) -> Backbone:
        tuner = self.recipe.tuner
        if isinstance(tuner, NoNetwork):
            return FixedFeatures(modality, words=tuner.words, side=tuner.side)
        if self.model_name is None:
            raise ConfigError(f"recipe `{self.recipe.name}` needs a model: give a hub id or a folder (--model)")
        return load_backbone(self.model_name, modality, **self.loading).to(self.device)

    def _restore(self, run: Run, labels: Sequence[str]) -> None:
        """Base model plus commits: nothing else decides what follows."""
        # rules, heads and consolidations hold state: every run starts from untouched ones
        self.recipe = recipe = copy.deepcopy(self._recipe)
        self.heads, backbone = recipe.heads, self._need_backbone()
        self._evaluator = Evaluator(backbone, int(self.training["per_device_eval_batch_size"]), self.progress)
        first = self.heads[0]
        self._surrogate = None if first.trains or not recipe.tuner.trains else first.trainer()
        for head in self._all_heads():
            embeddings = None
            if head.needs_label_embeddings:
                embeddings = backbone.label_embeddings(head.label_prompts(labels))
            head.open(backbone.width, labels, seed=self.seed, label_embeddings=embeddings)
            head.to(self.device)
        recipe.consolidation.open(backbone, recipe.tuner)
        learned = run.commits[1:]
        recipe.consolidation.restore(learned)
        backbone.to(self.device)
        if learned:
            state = learned[-1].tensors("head.safetensors")
            for name, head in self._named_heads():
                head.load_state({k[len(name) + 1 :]: v for k, v in state.items() if k.startswith(name + ".")})
            if learned[-1].has("rules.safetensors"):
                state = learned[-1].tensors("rules.safetensors")
                for i, rule in enumerate(recipe.rules):
                    rule.load_state({k.split(".", 1)[1]: v for k, v in state.items() if k.startswith(f"{i}.")})

    def _named_heads(self) -> Iterator[tuple[str, Head]]:
        yield from ((head.name, head) for head in self.heads)
        if self._surrogate is not None:
            yield "trainer", self._surrogate

    def _all_heads(self) -> list[Head]:
        return [head for _, head in self._named_heads()]

    def _need_backbone(self) -> Backbone:
        if self.backbone is None:
            raise ConfigError("nothing is learned yet: call learn(stream), or Learner.open(run)")
        return self.backbone

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

    # ---- one step ----

    def _prepare(self, step: Step) -> Examples:
        """The rows that are trained on and shown to the rules, as model inputs; none where nothing looks at them."""
        trains = self.recipe.tuner.trains or self._surrogate is not None or self.heads[0].trains
        return self._need_backbone().prepare(self.recipe.consolidation.rows(step)) if trains else []

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
                self.training,
                task=step.name,
                seed=task_seed(self.seed, step.index),
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
        watching = [head for head in self.heads if type(head).observe is not Head.observe]
        anew = [head for head in watching if head.refresh]
        for head in anew:
            head.clear()
        for task in stream.tasks[0 if anew else step.first : step.learned] if watching else ():
            features = self._evaluator.features(task, "train")
            labels = torch.tensor(task.train["label"])
            for head in watching if task in step.tasks else anew:
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
        drifts = [self._evaluator.drift[task.name] for task in stream.tasks[: step.first]]
        if not drifts or not self.recipe.tuner.trains:
            return []
        note = "the task that moved most; test inputs were never shown to any rule"
        name = "change of features on earlier tasks' test inputs"
        return [Measurement(name, max(drifts), None, "relative", type(self.recipe.tuner).__name__, note)]

    # ---- committing ----

    def _commit_untouched(self, run: Run, stream: Stream) -> None:
        predictions = self._evaluator.predictions(stream, None, self.heads, self.recipe.consolidation)
        run.commit(
            UNTOUCHED, {"predictions.safetensors": predictions}, {"learned": [], "classes": [], "guarantees": []}
        )

    def _note_start(self, run: Run) -> None:
        """Journal a start, and warn where a run goes on under other versions: its bits may then differ."""
        now, then = versions(), run_directory.read_config(self.path).get("versions", {})
        run.note("resume" if run.commits else "start", command=sys.argv, versions=now, device=str(self.device))
        other = [f"{k} {then.get(k)} -> {v}" for k, v in now.items() if then.get(k) != v]
        if run.commits and other:
            self.progress.say(f"{self.path}: goes on with {', '.join(other)}; bits may differ from an undisturbed run")

    def _files(self, predictions: dict[str, Tensor]) -> dict[str, Any]:
        rules = {f"{i}.{k}": v for i, rule in enumerate(self.recipe.rules) for k, v in rule.state().items()}
        return {
            **self.recipe.consolidation.files(),
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
            disk_bytes=sum(f.stat().st_size for f in commit.path.iterdir()),
        )
        self.progress.say(f"{self.recipe.name}: task {step.index + 1} `{step.name}` learned in {training + rest:.1f} s")

    # ---- using what was learned ----

    @classmethod
    def open(cls, run: str | Path, **options: Any) -> Learner:
        """The learner of a finished run, ready to predict and export.

        Raises:
            RunError: no run is there, it is damaged, or its base model is another one now.
        """
        config = run_directory.read_config(Path(run))
        model, settings = config["model"], config["training"]
        name = options.pop("model", None) or config["model_name"]
        loading = {} if name is None else {k: model[k] for k in ("pooling", "max_length", "trust_remote_code")}
        learner = cls(
            name,
            options.pop("recipe", config["recipe"]),
            run,
            training=settings,
            seed=config["seed"],
            **loading,
            **options,
        )
        learner.backbone = learner._load_base(model["modality"], model["fingerprint"])
        directory, stream = Run.read(run), config["stream"]
        learner._restore(directory, stream["labels"])
        seen = directory.commits[-1].manifest["classes"] if directory.commits else []
        learner._predicts = (stream["labels"], seen, stream["inputs"])
        return learner

    def predict(
        self, inputs: Sequence[Any], *, head: str | None = None, classes: Sequence[str] | None = None
    ) -> list[str]:
        """Label texts for new inputs: texts, (text, text_pair) tuples, or PIL images.

        Args:
            head: which head to read; None takes the first.
            classes: choose among these label texts only (task-incremental use); None chooses among all classes learned.

        Raises:
            ConfigError: nothing is learned yet, or an unknown head or class.
        """
        backbone = self._need_backbone()
        if self._predicts is None or not self._predicts[1]:
            raise ConfigError("no task is learned yet: call learn(stream) first")
        labels, seen, columns = self._predicts
        by_name = {h.name: h for h in self.heads}
        if head is not None and head not in by_name:
            raise ConfigError(f"this run reads no head `{head}`: {nearest(head, by_name)}")
        allowed = list(seen)
        if classes is not None:
            known = {labels[c]: c for c in seen}
            for name in classes:
                if name not in known:
                    raise ConfigError(f"class `{name}` is not learned: {nearest(name, known)}")
            allowed = [known[name] for name in classes]
        rows = [x if isinstance(x, tuple) else (x,) for x in inputs]
        if any(len(r) > len(columns) for r in rows):
            raise ConfigError(f"each input holds {', '.join(columns)}: one value for each")
        table = {c: [r[i] for r in rows] for i, c in enumerate(columns[: len(rows[0])] if rows else ())}
        if not rows:
            return []
        data = datasets.Dataset.from_dict({**table, "label": [0] * len(rows), "id": [""] * len(rows)})
        features = backbone.features(backbone.prepare(data), int(self.training["per_device_eval_batch_size"]))
        scores = by_name[head or self.heads[0].name].scores(features)
        return [labels[allowed[i]] for i in scores[:, allowed].argmax(1).tolist()]

    def _load_base(self, modality: Any, expected: str) -> Backbone:
        backbone = self._load_backbone(modality)
        if backbone.fingerprint != expected:
            raise RunError(
                f"{self.path} was made with another base model than `{self.model_name}` is now: give the one that it "
                "was made with (--model)"
            )
        return backbone

    def fresh(self) -> tuple[Backbone, Consolidation]:
        """The base model once more, untouched, and the recipe's consolidation over it, nothing restored yet.

        Raises:
            ConfigError: nothing is learned yet.
            RunError: the base model is another one now.
        """
        backbone, recipe = self._need_backbone(), copy.deepcopy(self._recipe)
        base = self._load_base(backbone.modality, backbone.fingerprint)
        recipe.consolidation.open(base, recipe.tuner)
        return base, recipe.consolidation

    def export(
        self,
        folder: str | Path,
        *,
        only: Sequence[str] | None = None,
        without: Collection[str] = (),
        scales: Mapping[str, float] | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> Path:
        """Write a plain transformers folder, adapters merged; the run stays as it is.

        Without a choice of tasks this is the model as it is now; with one, the base model and what the chosen tasks
        left on its weights, added up in fp32: the same bits as if the other deltas had never been.

        Args:
            only: tasks to take, None all; without: tasks to leave out.
            scales: factors of tasks, times the consolidation's own.
            dtype: what the fp32 weights are rounded to, once.

        Raises:
            ConfigError: nothing is learned yet, there is no network to export, no weights could hold the adapter; an
                unknown task; tasks that leave nothing to choose from.
        """
        backbone = self._need_backbone()
        if isinstance(backbone, FixedFeatures):
            raise ConfigError(f"recipe `{self.recipe.name}` has no network to export")
        if dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype is float32 or bfloat16, not `{dtype}`")
        commits = Run.read(self.path).commits
        if not commits:
            raise ConfigError("nothing is learned yet: call learn(stream) first")
        if only is None and not without and not scales:
            model: Any = plain(copy.deepcopy(backbone.model), commits[-1].path)
        else:
            chosen = choose(commits[-1].manifest["learned"], only, without, scales)
            backbone, consolidation = self.fresh()
            consolidation.compose({c.manifest["task"]: c for c in commits[1:]}, chosen)
            model = backbone.model
        model = model.to(dtype=getattr(torch, dtype))
        with run_directory.writing(Path(folder)):
            model.save_pretrained(str(folder))
            backbone.processor.save_pretrained(str(folder))
        return Path(folder)


def _check_learned(run: Run, stream: Stream) -> None:
    """A stream may have grown since; what was learned must still be what it was."""
    tasks = {task.name: task for task in stream}
    learned = run.commits[-1].manifest["learned"] if run.commits else []
    now = [task.name for task in stream.tasks[: len(learned)]]
    if now != learned:
        raise RunError(
            f"{run.path} has learned {', '.join(learned)} in this order; the stream now starts with "
            f"{', '.join(now) or 'nothing'}: append new tasks at its end, or use another run directory (--out)"
        )
    for commit in run.commits:
        for name, digest in commit.manifest.get("data", {}).items():
            if fingerprint(tasks[name]) != digest:
                raise RunError(
                    f"the data of task `{name}` is not what {run.path} learned: restore it, or use another run "
                    "directory (--out)"
                )


def step_budget(step: Step, training: dict[str, Any]) -> int:
    """Optimizer steps of a bout of training: the same in sum, however the tasks are dealt to bouts."""
    if training.get("max_steps", -1) > 0:
        return int(training["max_steps"]) * len(step.tasks)
    return count_steps(sum(len(task.train) for task in step.tasks), training)


def task_seed(seed: int, index: int) -> int:
    """The seed of one task: whatever was drawn before, a task trained again draws the same."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:4], "little") >> 1
