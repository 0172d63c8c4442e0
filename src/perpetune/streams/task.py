"""What a task and a stream are: normalised once, at the door; everything behind trusts them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow

from .labels import key, warn_of_forms

Scenario = Literal["class", "domain", "task"]
Modality = Literal["text", "image", "language"]


@dataclass(frozen=True)
class Task:
    """One task of a stream.

    Attributes:
        name: unique in its stream, lower case, safe as a file name.
        classes: indices into `Stream.labels` of the classes of this task, in the task's own order.
        train, test, validation: rows with the columns
            `id` (str: hash of the sample's content, the same wherever the sample appears),
            `label` (int: index into `Stream.labels`) and the input columns of the stream
            (`text`, or `text` and `text_pair`, or `image` as a PIL image; `prompt`, `image` and `prompt`, or `messages`
            as JSON, to be answered with the label text). A caption is the label text of its image.
            `validation` is None unless the source has one or a share was split off.
        instruction: what to decide, in words, where the source says it.
        reopens: the task before that this one goes on with, where that is known (`learn_drift`); what keeps an adapter
            for every task keeps one for both.
        captions: whether the label texts are captions, each of an image or few.
        training: settings of `transformers.TrainingArguments` that are its own, over those of the run.
        gone: splits whose data was deleted since a run learned the task (see `load_stream(learned=)`); they are empty,
            and without training data `classes` are those of the data that is left.
        metric: of free texts, how a generated answer is scored beside the response of its row (see `metrics.text`);
            such a task has no classes, its rows have `response` (str) and the label -1. None: responses are classes.
    """

    name: str
    classes: tuple[int, ...]
    train: datasets.Dataset
    test: datasets.Dataset
    validation: datasets.Dataset | None = None
    instruction: str | None = None
    reopens: str | None = None
    captions: bool = False
    training: Mapping[str, Any] = field(default_factory=dict)
    gone: tuple[str, ...] = ()
    metric: str | None = None

    @cached_property
    def candidates(self) -> tuple[int, ...]:
        """The classes among which its test examples are placed: its own; of captions those of the test data."""
        return tuple(sorted(set(self.test["label"][:]))) if self.captions else self.classes


@dataclass(frozen=True)
class Stream:
    """Tasks in the order in which they arrive.

    Attributes:
        name: for tables and file names.
        tasks: in order.
        labels: the label texts of all classes, in order of first appearance. A class *is* its label text:
            two tasks that share a label text share the class.
        scenario: "class" (a prediction chooses among all classes seen; the task-incremental reading, among the classes
            of the sample's own task, is reported beside it), "domain" (no task has a class that the first lacks),
            "task" (the task is given with each sample).
        inputs: the input columns, ("text",), ("text", "text_pair"), ("image",), ("prompt",), ("image", "prompt") or
            ("messages",).
        source: JSON-able description from which `load_stream` makes the same stream again.
        ordered: whether somebody said in which order the tasks come; else it is that of their names, and a run that has
            learned some of them goes on in its own (`ordered_after`).
    """

    name: str
    tasks: tuple[Task, ...]
    labels: tuple[str, ...]
    scenario: Scenario
    inputs: tuple[str, ...]
    source: dict = field(default_factory=dict)
    ordered: bool = True

    @property
    def modality(self) -> Modality:
        """What is read; "language" where it is prompts, and the label texts are answers."""
        if not {"prompt", "messages"}.isdisjoint(self.inputs):
            return "language"
        return "image" if "image" in self.inputs else "text"

    @property
    def captions(self) -> bool:
        """Whether label texts are captions of images."""
        return any(task.captions for task in self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def label_texts(self, classes: Sequence[int]) -> list[str]:
        return [self.labels[c] for c in classes]

    def select(self, names: Sequence[str]) -> Stream:
        """The stream made of these tasks in this order (class indices are kept).

        Raises:
            StreamError: a name that no task has.
        """
        from ..core.errors import StreamError, nearest

        by_name = {task.name: task for task in self.tasks}
        for name in names:
            if name not in by_name:
                raise StreamError(f"no task `{name}` in stream `{self.name}`: {nearest(name, by_name)}")
        tasks = tuple(by_name[n] for n in names)
        return replace(self, tasks=tasks, source={**self.source, "tasks": list(names)}, ordered=True)

    def ordered_after(self, known: Sequence[str]) -> Stream:
        """The stream with the tasks that a run knows first, in the order of the run, and the others behind them.

        It stays as it is where somebody said the order.

        Args:
            known: names of tasks, which this stream need not have.
        """
        place = {name: i for i, name in enumerate(dict.fromkeys(known))}
        names = [task.name for task in self.tasks]
        order = sorted(names, key=lambda name: place.get(name, len(place)))
        return self if self.ordered or order == names else replace(self.select(order), ordered=False)

    def numbered(self, labels: Sequence[str]) -> Stream:
        """The same stream with its classes numbered as in `labels`; those that are not among them follow.

        A class that `labels` write in another form (1.0 for 1) is called as it is there.
        """
        texts = self.labels
        if self.modality != "language" and not self.captions:
            written = {key(text): text for text in reversed(labels) if text not in self.labels}
            texts = tuple(t if t in labels else written.get(key(t), t) for t in texts)
            lost = {text: "the run" for text in labels if text not in texts}
            warn_of_forms(lost | {text: f"stream `{self.name}`" for text in texts if text not in labels})
        order = {text: i for i, text in enumerate(dict.fromkeys((*labels, *texts)))}
        number = np.array([order[text] for text in texts], dtype=np.int64)
        tasks = self.tasks
        if (number != np.arange(len(number))).any():
            tasks = tuple(
                replace(
                    task,
                    classes=tuple(int(number[c]) for c in task.classes),
                    train=_renumbered(task.train, number),
                    test=_renumbered(task.test, number),
                    validation=None if task.validation is None else _renumbered(task.validation, number),
                )
                for task in tasks
            )
        return replace(self, tasks=tasks, labels=tuple(order))

    def on_validation(self) -> Stream:
        """The stream that is measured on its validation splits: for choosing settings without touching the test data.

        Raises:
            StreamError: a task has no validation split.
        """
        from ..core.errors import StreamError

        tasks = []
        for task in self.tasks:
            validation = task.train if task.validation is None and "train" in task.gone else task.validation
            if validation is None:
                raise StreamError(f"task `{task.name}` has no validation split: split one off with validation_share")
            tasks.append(replace(task, test=validation, validation=None))
        return replace(self, tasks=tuple(tasks), name=f"{self.name} (validation)")


def _renumbered(data: datasets.Dataset, number: np.ndarray) -> datasets.Dataset:
    """The rows with label number[c] for c; inputs are not copied."""
    table = data.data.table
    old = table.column("label").to_numpy()  # of all rows of the table, -1 for those that are not in use
    new = pyarrow.array(np.where(old < 0, old, number[old]))
    table = table.set_column(table.column_names.index("label"), "label", new)
    # left alone, `datasets` would pickle whole columns to know what they hold
    stamp = hashlib.sha256(data._fingerprint.encode() + number.tobytes()).hexdigest()[:32]
    return datasets.Dataset(table, info=data.info, split=data.split, indices_table=data._indices, fingerprint=stamp)
