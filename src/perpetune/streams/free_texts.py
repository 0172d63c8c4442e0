"""Tasks whose responses are free texts: scored by a metric, and no classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from datasets import Dataset, Features, Value

from ..core.errors import ConfigError, nearest
from ..metrics.text import LIKELIHOOD, metric, rouge_l, scorer
from .quiet import without_bars
from .task import Stream, Task

Responses = Literal["exact", "stripped"]
MANY, SENTENCES, WORDS = 20, 5, 4  # responses that may be classes, however few rows there are: any; of so many words


def metrics_of(tasks: Sequence[Task], chosen: str | Mapping[str, str] | None) -> dict[str, str]:
    """The metric of each task of free texts: of its task.json, or what was chosen for all, or for it; texts that answer
    nothing are measured by their likelihood.

    Raises:
        ConfigError: no such metric or task.
    """
    own = {task.name: LIKELIHOOD for task in tasks if answers_nothing(task)}
    own |= {task.name: task.metric for task in tasks if task.metric is not None}
    given = {task.name: chosen for task in tasks} if isinstance(chosen, str) else dict(chosen or {})
    names = [task.name for task in tasks]
    for task in given:
        if task not in names:
            raise ConfigError(f"metric: no task `{task}`: {nearest(task, names)}")
    found = {**own, **given}
    for name in set(found.values()) - {LIKELIHOOD}:
        if metric(name) is rouge_l:
            scorer()  # before anything is trained
    return found


def check_classes(stream: Stream) -> None:
    """
    Raises:
        ConfigError: a task whose responses are read as classes, and are nearly all different.
    """
    for task in stream:
        words = [len(stream.labels[c].split()) for c in task.classes]
        many = SENTENCES if sum(words) >= WORDS * len(words) else MANY
        if task.metric is None and len(task.classes) > max(many, len(task.train) // 2):
            raise ConfigError(
                f"task `{task.name}` has {len(task.classes)} different responses, to {len(task.train)} prompts that "
                "are learned, and without a metric each is a class to choose among: say how its answers are scored "
                "(--metric token_f1, rouge_l, exact_match, contains or likelihood)"
            )


def answers_nothing(task: Task) -> bool:
    """Whether its rows are texts without prompts."""
    rows = task.test if len(task.test) else task.train
    return rows.column_names[2:] == ["prompt"] and len(rows) > 0 and not rows["prompt"][0]


def stripped(stream: Stream) -> Stream:
    """The stream with responses without blanks around them, as all streams were read at first; for runs that began."""
    labels = tuple(label.strip() for label in stream.labels)
    if stream.modality != "language":
        return stream
    source = {**stream.source, "responses": "stripped"} if stream.source else {}
    if labels == stream.labels and not any(task.metric for task in stream):
        return replace(stream, source=source)
    number = {label: c for c, label in enumerate(dict.fromkeys(labels))}

    def rows(data: Dataset | None) -> Dataset | None:
        if data is None:
            return None
        if "response" in data.column_names:
            texts = [text.strip() for text in data["response"][:]]
            return data.remove_columns("response").add_column("response", texts, feature=Value("string"))
        new = [number[labels[y]] for y in data["label"][:]]
        return data.remove_columns("label").add_column("label", new, feature=Value("int64"))

    tasks = []
    for task in stream:
        splits = {split: rows(getattr(task, split)) for split in ("train", "test", "validation")}
        classes = tuple(dict.fromkeys(number[labels[c]] for c in task.classes))
        tasks.append(replace(task, classes=classes, **splits))  # type: ignore[arg-type]
    return replace(stream, tasks=tuple(tasks), labels=tuple(number), source=source)


def as_free_texts(
    tasks: Sequence[Task], labels: Sequence[str], metrics: Mapping[str, str]
) -> tuple[tuple[Task, ...], tuple[str, ...]]:
    """The tasks, those with a metric without classes, and the label texts of the classes that are left.

    Args:
        labels: label texts of all classes; of tasks of prompts, their responses.

    Raises:
        ConfigError: a metric for a task that has no prompts.
    """
    for task in tasks:
        columns = task.test.column_names
        if task.name in metrics and "prompt" not in columns and "messages" not in columns:
            raise ConfigError(f"task `{task.name}` has labels and no responses to score by `{metrics[task.name]}`")
    kept = [c for task in tasks if task.name not in metrics for c in task.classes]
    left = sorted(set(kept))
    number = {c: i for i, c in enumerate(left)}
    made = []
    for task in tasks:
        free = task.name in metrics

        def rows(data: Dataset | None, free: bool = free) -> Dataset | None:
            if data is None:
                return None
            if not len(data):  # gone since it was learned; `datasets` adds no column to nothing
                added = {"label": Value("int64"), **({"response": Value("string")} if free else {})}
                columns = Features({**data.features, **added})
                return Dataset.from_dict({name: [] for name in columns}, features=columns)
            values = data["label"][:]
            new = [-1] * len(values) if free else [number[y] for y in values]
            data = data.remove_columns("label").add_column("label", new, feature=Value("int64"))
            if free:
                texts = [labels[y] for y in values]
                data = data.add_column("response", texts, feature=Value("string"))
            return data

        with without_bars():  # rows that a limit chose are copied
            train, test, validation = (rows(data) for data in (task.train, task.test, task.validation))
        assert train is not None and test is not None
        classes = () if free else tuple(number[c] for c in task.classes)
        splits = {"train": train, "test": test, "validation": validation}
        made.append(replace(task, classes=classes, metric=metrics.get(task.name), **splits))
    return tuple(made), tuple(labels[c] for c in left)
