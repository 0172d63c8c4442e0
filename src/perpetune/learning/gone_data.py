"""Learned tasks whose data is gone: they are known from commits, and evaluated with the test data that is left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
from datasets import Features, Value

from ..core.errors import RunError, StreamError
from ..runs.commit import Commit, active
from ..runs.config_file import CONFIG, read_config
from ..runs.directory import Run
from ..streams import Stream, Task, fingerprint, split_fingerprints


def learned_tasks(path: Path) -> list[str]:
    """The tasks that a run has learned, in order; none where there is no run yet."""
    commits = Run.read(path).commits if (path / CONFIG).exists() else []
    return list(commits[-1].manifest["learned"]) if commits else []


def with_known_scenario(stream: Stream, path: Path) -> Stream:
    """A stream that has lost data of a run's tasks, in the scenario of the run: its own was chosen by what is left. So
    is one of free texts, where no class says which it is."""
    whole = {task.name for task in stream if len(task.train)}
    if not (path / CONFIG).exists() or (stream.labels and whole.issuperset(learned_tasks(path))):
        return stream
    written = read_config(path)["stream"]
    chosen = {written["scenario"], stream.scenario} == {"class", "domain"}
    fits = written["scenario"] == "class" or set(stream.labels) <= set(written["labels"])
    return replace(stream, scenario=written["scenario"]) if chosen and fits else stream


def completed(run: Run, stream: Stream, learned: Sequence[str], every: bool = False) -> Stream:
    """The stream with all learned tasks first, in their order: without rows where data is gone.

    Args:
        stream: its classes numbered as in the run.
        learned: names, in order.
        every: whether a learned task that the stream does not even name is refused.

    Raises:
        RunError: learned tasks are in another order, or are not what they were.
        StreamError: a task that is to be learned has no rows.
    """
    here = {task.name: task for task in stream}
    left = [name for name in learned if name in here]
    now = [task.name for task in stream.tasks[: len(left)]]
    other = not left and stream.source.get("source") != run.config["stream"]["source"].get("source")
    commits = {name: c for c in active(run.commits) for name in c.manifest.get("data", {})}
    elsewhere = {name for name, commit in commits.items() if {"trainer", "adopted"} & commit.manifest.keys()}
    lost = [name for name in learned if name not in here and name not in elsewhere]
    if now != left or (lost and (every or other)):
        began = ", ".join(task.name for task in stream.tasks[: len(learned)])
        raise RunError(
            f"{run.path} has learned {', '.join(learned)} in this order; the stream now starts with "
            f"{began or 'nothing'}: append new tasks at its end, or use another run directory (--out)"
        )
    tasks = [_known(run, stream, commits, name, here.get(name)) for name in learned]
    new = stream.tasks[len(left) :]
    for task in new:
        for split in ("train", "test"):
            if not len(getattr(task, split)):
                raise StreamError(
                    f"task `{task.name}` has no {split} split, and {run.path} has not learned it: put {split}.* into "
                    "its folder"
                )
    return replace(stream, tasks=(*tasks, *new))


def told(run: Run, stream: Stream, learned: Sequence[str]) -> list[str]:
    """What is gone, in words: a line for training data, one for test data; and new tasks that are learned ones."""
    lines = _learned_again(run, stream.tasks[len(learned) :])
    adopted = {c.manifest["task"]: c.manifest["sizes"] for c in active(run.commits) if "adopted" in c.manifest}
    for task in stream.tasks[: len(learned)]:
        if task.name in adopted and not len(task.test):
            lines.append(_not_evaluated(task.name, bool(adopted[task.name][task.name]["test"])))
    known = [task for task in stream.tasks[: len(learned)] if task.name not in adopted]
    for split, means in (("train", "it is not needed"), ("test", "they are not evaluated any more")):
        lost = [f"`{task.name}`" for task in known if not len(getattr(task, split))]
        kind = {"train": "training", "test": "test"}[split]
        if lost:
            lines.append(f"{run.path} goes on without the {kind} data of {', '.join(lost)}, which is gone: {means}")
    return lines


def _not_evaluated(adopted: str, known: bool) -> str:
    """Why a task that was trained elsewhere is not evaluated; `known`: there was a sample of its data then."""
    if not known:
        return f"`{adopted}` was adopted without data, and is not evaluated"
    return (
        f"`{adopted}` was adopted, and this stream has no data of it: it is not evaluated. To have it judged, put the "
        f"rows that it was adopted with into the stream, as {adopted}/test.jsonl"
    )


def _learned_again(run: Run, new: Sequence[Task]) -> list[str]:
    rows = {
        splits["train"]: name
        for commit in active(run.commits)
        for name, splits in commit.manifest.get("splits", {}).items()
        if splits.get("train")
    }
    same = {task.name: rows.get(split_fingerprints(task)["train"]) for task in new} if rows else {}
    return [
        f"task `{name}` has the training rows of `{old}`, which {run.path} has learned, and is learned as another "
        f"task: if its folder was renamed, stop here and call it `{old}` again"
        for name, old in same.items()
        if old
    ]


def check_needed(run: Run, stream: Stream, learned: Sequence[str], heads: Sequence[Any]) -> None:
    """
    Raises:
        RunError: a head gathers statistics of all tasks anew, and training data is gone.
    """
    lost = [f"`{task.name}`" for task in stream.tasks[: len(learned)] if not len(task.train)]
    anew = [head.name for head in heads if head.refresh]
    if lost and anew:
        raise RunError(
            f"head `{anew[0]}` gathers the training data of all tasks anew after every task, and that of "
            f"{', '.join(lost)} is gone: restore it, or use another run directory (--out) and a head that keeps its "
            f"sums (`{anew[0].removesuffix('_refresh')}`)"
        )


def _known(run: Run, stream: Stream, commits: dict[str, Commit], name: str, task: Task | None) -> Task:
    """A learned task as it is now, checked against its commit.

    Raises:
        RunError: data that is left, or training settings, are not those that were learned.
    """
    commit = commits[name]
    own = commit.manifest.get("training", {}).get(name, {})
    if task is None:
        nothing = _no_rows(stream.inputs)
        return Task(name, classes_of(run, commit, name), nothing, nothing, captions=stream.captions, training=own)
    if not unchanged(commit, task):
        raise RunError(
            f"the data of task `{name}` is not what {run.path} learned: restore it, or use another run directory "
            "(--out)"
        )
    scored = commit.manifest.get("metrics", {}).get(name)
    if scored not in (None, task.metric) and len(task.test):
        raise RunError(
            f"answers of task `{name}` were scored by {scored} so far, now it is {task.metric}, and the scores of two "
            f"metrics cannot be compared: give that one for it (--metric '{name}={scored}'), or another run directory "
            "(--out)"
        )
    if not len(task.train):  # nor is its folder what it was
        return replace(task, classes=classes_of(run, commit, name), training=own)
    if commit.manifest.get("retried") and not task.training:
        return replace(task, training=own)  # the settings of the try that stayed
    if own != dict(task.training):
        raise RunError(
            f"task `{name}` was learned with training settings {own or 'of the run'} of its own, now they are "
            f"{dict(task.training) or 'those of the run'}: restore them, or use another run directory (--out)"
        )
    return task


def unchanged(commit: Commit, task: Task) -> bool:
    """Whether what is left of a task is what was learned. Of runs made before the splits were written down one by one,
    the labels of test data are compared where other data is gone."""
    if fingerprint(task) == commit.manifest["data"][task.name]:
        return True
    known = commit.manifest.get("splits", {}).get(task.name)
    now = {split: digest for split, digest in split_fingerprints(task).items() if len(getattr(task, split))}
    if known is not None:
        return all(known.get(split) == digest for split, digest in now.items())
    if len(task.train) and len(task.test):
        return False
    stored = commit.tensors("predictions.safetensors").get(f"target/{task.name}")
    return "test" not in now or stored is None or stored.tolist() == task.test["label"][:]


def classes_of(run: Run, commit: Commit, name: str) -> tuple[int, ...]:
    """The classes that a task had. Of runs made before they were written down: those of its test data, and those that
    it brought."""
    known = commit.manifest.get("task_classes", {}).get(name)
    if known is not None:
        return tuple(known)
    target = commit.tensors("predictions.safetensors").get(f"target/{name}")
    before = run.commits[run.commits.index(commit) - 1].manifest["classes"]
    brought = set(commit.manifest["classes"]) - set(before)
    return tuple(sorted(brought | (set(target.tolist()) if target is not None else set())))


def _no_rows(inputs: Sequence[str]) -> datasets.Dataset:
    columns = {"id": Value("string"), "label": Value("int64")} | {name: Value("string") for name in inputs}
    return datasets.Dataset.from_dict({name: [] for name in columns}, features=Features(columns))
