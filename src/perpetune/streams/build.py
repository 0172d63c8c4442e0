"""From drafts to tasks: checks, splits, caps, and numbers for the labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from datasets import Dataset

from ..core.errors import StreamError
from .rows import Rows, in_order
from .sampling import stratified
from .splitting import Draft, check_labels
from .task import Scenario, Task


def build_task(
    draft: Draft,
    labels: dict[str, int],
    *,
    train_limit: int | None,
    test_limit: int | None,
    validation_share: float,
    seed: int,
) -> Task:
    """Make one task; `labels` (text -> index) grows by the classes that are new. Options as in `load_stream`.

    Raises:
        StreamError: an empty split, a label that task.json or the training data lacks, a cap below the classes.
    """
    parts = dict(draft.splits)
    lost = "train" in draft.gone
    parts["train"].check_classes()
    for split, rows in parts.items():
        if split not in draft.gone:
            _check_rows(rows, None if lost else parts["train"], draft.labels)
    train = parts["train"]
    known = np.concatenate([rows.labels for rows in parts.values()]) if train.free_texts or lost else train.labels
    classes = in_order(known, draft.labels or (), (parts["test"] if lost else train).order)
    if validation_share and "validation" not in parts and not lost:
        train, validation = parts["train"].split_off(validation_share, seed, draft.name, "validation")
        if len(validation) == 0:
            raise StreamError(
                f"validation_share {validation_share} of {train.place} ({len(train)} rows) leaves validation empty"
            )
        parts.update(train=train, validation=validation)
    if train_limit is not None and train_limit < len(classes) and not (train.free_texts or lost):
        raise StreamError(
            f"train_limit {train_limit} is below the {len(classes)} classes of task `{draft.name}`: "
            "some would have no training example"
        )
    for label in classes:
        labels.setdefault(label, len(labels))
    finished = {}
    for split, rows in parts.items():
        limit, least = (train_limit, 1) if split == "train" else (test_limit, 0)
        if limit is not None and limit < len(rows):
            rows = rows.pick(stratified(rows.strata(limit), limit, seed, draft.name, split, least=least))
        finished[split] = rows.finish(labels)
        if rows.captions and split != "train":
            _check_captions(finished[split], f"the {split} split of task `{draft.name}`")
    return Task(
        name=draft.name,
        classes=tuple(labels[label] for label in classes),
        train=finished["train"],
        test=finished["test"],
        validation=finished.get("validation"),
        instruction=draft.instruction,
        training=draft.training,
        metric=draft.metric,
        captions=train.captions,
        gone=draft.gone,
    )


def _check_captions(data: Dataset, place: str) -> None:
    """An image is asked for one caption: of several, one answer could only ever be right for one."""
    pairs = set(zip(data["id"][:], data["label"][:], strict=True))
    several = len(pairs) - len({sample for sample, _ in pairs})
    if several:
        raise StreamError(
            f"{place} has {several} further captions of images that have one, and each image is asked for one: keep "
            "one a picture there (training data may have several)"
        )


def _check_rows(rows: Rows, train: Rows | None, allowed: Sequence[str] | None) -> None:
    if len(rows) == 0:
        raise StreamError(f"{rows.place} is empty")
    strange = sorted(set(rows.labels) - set(rows.labels if allowed is None else allowed))
    if strange:
        raise StreamError(
            f"label `{strange[0]}` in {rows.place} is not among the labels of its task.json: {', '.join(allowed or ())}"
            f"; it is in {rows.first(strange)}"
        )
    if train is not None and not rows.free_texts:
        check_labels(rows, train)


def same_inputs(drafts: Sequence[Draft]) -> tuple[str, ...]:
    """The input columns that all splits of all tasks have.

    Raises:
        StreamError: they differ.
    """
    first = drafts[0].splits["train"]
    expected = tuple(first.data.column_names)
    for draft in drafts:
        for rows in draft.splits.values():
            if tuple(rows.data.column_names) != expected:
                mend = "write them alike"
                if {"prompt", "messages"} <= {*rows.data.column_names, *expected}:
                    mend = 'write a prompt as a conversation, "messages": [{"role": "user", "content": prompt}, answer]'
                raise StreamError(
                    f"{rows.place} has {' and '.join(rows.data.column_names)}, but {first.place} has "
                    f"{' and '.join(expected)}, and all tasks of a stream take the same inputs: {mend}"
                )
    return expected


def choose_scenario(asked: Scenario | None, tasks: Sequence[Task], labels: Sequence[str]) -> Scenario:
    """The scenario asked for; without one, "domain" if several tasks all have the same classes, or none has any (free
    texts, of which more may come), else "class".

    Raises:
        StreamError: "domain" is asked for and a task has a class that the first lacks.
    """
    tasks = [task for task in tasks if "train" not in task.gone] or tasks  # the others have lost classes, perhaps
    first = tasks[0]
    if asked is None:
        same = all(set(task.classes) == set(first.classes) for task in tasks)
        return "domain" if same and (len(tasks) > 1 or not labels) else "class"
    other = next((task for task in tasks if not set(task.classes) <= set(first.classes)), None)
    if asked == "domain" and other is not None:
        odd = labels[min(set(other.classes) - set(first.classes))]
        raise StreamError(
            f"not domain-incremental: only one of the tasks `{first.name}` and `{other.name}` has the label `{odd}`; "
            'use scenario="class" or "task"'
        )
    return asked
