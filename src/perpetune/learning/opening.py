"""A run directory and a stream, brought together before anything is learned."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..core.environment import versions
from ..core.errors import ConfigError, RunError, StreamError
from ..runs.commit import active, reverted
from ..runs.directory import Run, read_config
from ..runs.result import JOINED, NO_READING
from ..streams import Stream, Task, fingerprint
from .learned import Learned
from .trainer import resolve_training


class Opening(Learned):
    """Opens a run for a stream: a new one, or one that has learned its first tasks already. See `Learner`.

    Attributes:
        _joined: what the untouched model says of tasks that joined the stream after the run's first commit.
    """

    _joined: dict[str, Tensor]

    def _open(self, stream: Stream, without: str | None = None) -> tuple[Run, Stream]:
        """The run, and its stream: classes numbered as they have always been in this run, without the tasks that were
        taken out, or are now (`without`)."""
        if not len(stream) and without is None:
            raise StreamError(f"stream `{stream.name}` has no task")
        self.backbone, self._predicts = self._load_backbone(stream.modality), None
        self._check_heads(self.backbone, stream.captions)
        self.recipe.tuner.check(self.backbone.model)
        for each in stream:  # before anything is written
            own_settings(self.training, each)
        run = Run.open(self.path, self.config(stream))
        try:
            whole = stream.numbered(read_config(self.path)["stream"]["labels"])
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
        asked = map(task_of, run.commits[0].tensors("predictions.safetensors"))
        known = {*run.commits[-1].manifest["learned"], *asked}
        joined = [task for task in stream if task.name not in known]
        if not joined:
            return {}
        start = copy.copy(run)
        start.commits = []
        self._restore(start, stream.labels)
        with self.progress:
            found = self._evaluator.predictions(stream, None, self.heads, self.recipe.consolidation, joined)
        return filed(JOINED, found)

    def _note_start(self, run: Run) -> None:
        """Journal a start, and warn where a run goes on under other versions: its bits may then differ."""
        now, then = versions(), read_config(self.path).get("versions", {})
        run.note("resume" if run.commits else "start", command=sys.argv, versions=now, device=str(self.device))
        other = [f"{k} {then.get(k)} -> {v}" for k, v in now.items() if then.get(k) != v]
        if run.commits and other:
            self.progress.say(f"{self.path}: goes on with {', '.join(other)}; bits may differ from an undisturbed run")


def task_of(key: str) -> str:
    """The task of a stored prediction."""
    return key.rpartition("/")[2]


def filed(prefix: str, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The predictions of heads among these, under a prefix."""
    return {prefix + key: value for key, value in found.items() if not key.startswith(NO_READING)}


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


def own_settings(training: dict[str, Any], task: Task) -> dict[str, Any]:
    """Training settings of a task, over those of the run.

    Raises:
        ConfigError: see `resolve_training`; says of which task.
    """
    try:
        return resolve_training(training, dict(task.training))
    except ConfigError as error:
        raise ConfigError(f"training of task `{task.name}`: {error}") from error
