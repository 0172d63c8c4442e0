"""One labelled dataset made into tasks: new classes a task, or one task a domain."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from ..core.errors import StreamError
from .labels import loose_key
from .origin import Origin
from .rows import Rows, column_texts, in_order, one_form, open_rows
from .sampling import shuffled


@dataclass(frozen=True)
class Draft:
    """A task before its labels have numbers.

    Attributes:
        name: as in `Task`.
        splits: "train", "test" and perhaps "validation".
        labels: the label texts that the source allows, in its order; None where it does not say.
        instruction, training, gone, metric: as in `Task`.
    """

    name: str
    splits: Mapping[str, Rows]
    labels: tuple[str, ...] | None = None
    instruction: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    gone: tuple[str, ...] = ()
    metric: str | None = None


def slug(text: str) -> str:
    """Lower case and safe as a file name: "Japanese_(Katakana)" is `japanese_katakana`."""
    return re.sub(r"_+", "_", re.sub(r"[^\w.-]+", "_", text.lower())).strip("_.-") or "task"


def divide(
    splits: Mapping[str, Dataset],
    name: str,
    *,
    split_by: str,
    classes_per_task: int | None,
    test_share: float,
    seed: int,
    order_seed: int | None,
    columns: Mapping[str, str] | None,
    groups: Sequence[Sequence[str]] | None = None,
    folder: Path | None = None,
    origins: Mapping[str, Origin] | None = None,
) -> list[Draft]:
    """Arguments as in `load_stream`; `splits` are those of the dataset, whose `name` is for messages.

    `groups` gives the classes of each task in order, instead of `classes_per_task` and `order_seed`; paths of images
    start in `folder`; `origins` say where the rows of each split are from.

    Raises:
        StreamError: no train split, a class or domain that only the test data has, a missing column, an empty split.
    """
    if "train" not in splits:
        found = ", ".join(splits) or "none that perpetune knows"
        raise StreamError(f"`{name}` has no train split; its splits are: {found}")
    places = {split: Origin.of((origins or {}).get(split, f"the {split} split of `{name}`")) for split in splits}
    rows = {split: open_rows(data, places[split], columns, folder) for split, data in splits.items()}
    texts = one_form(rows.values())
    rows = {split: part.relabelled(texts) for split, part in rows.items()}
    rows["train"].check_classes()
    for split in rows.keys() - {"train"}:
        if split_by == "class" or not rows[split].free_texts:
            check_labels(rows[split], rows["train"])
    if split_by != "class":
        dealt, keys = _by_column(splits, split_by, name)
    else:
        keys = {split: part.labels for split, part in rows.items()}
        dealt = [list(group) for group in groups or ()] or _by_class(rows["train"], classes_per_task or 1, order_seed)
    if "test" not in rows:
        train = rows["train"]
        labels = train.strata(round(test_share * len(train)))
        strata = np.array([f"{key}\x1f{label}" for key, label in zip(keys["train"], labels, strict=True)])
        # a class's rows are divided the same way whichever other classes share its task
        rows["train"], rows["test"] = train.split_off(test_share, seed, "test", strata=strata)
        keys["test"] = keys["train"]
    drafts = []
    for task, group in zip(_names(dealt), dealt, strict=True):
        parts = {}
        for split in rows:
            mine = np.isin(keys[split][rows[split].index], group)
            if split != "validation" or mine.any():
                parts[split] = rows[split].pick(mine, f"the {split} split of task `{task}`")
        drafts.append(Draft(task, parts, tuple(group) if groups else None))
    return drafts


def check_labels(rows: Rows, train: Rows) -> None:
    """Raises StreamError if `rows` has a label that `train` lacks."""
    unseen = sorted(set(rows.labels) - set(train.labels))
    if unseen:
        which = ", ".join(f"`{label}`" for label in unseen[:5])
        forms = {loose_key(label): label for label in train.labels}
        alike = forms.get(loose_key(unseen[0]))
        form = "" if alike is None or rows.free_texts else f", which is `{alike}` there but for its form"
        raise StreamError(
            f"{rows.place} has labels that the train split lacks ({which}): no model could learn them; the first is in "
            f"{rows.first(unseen)}{form}"
        )


def _by_class(train: Rows, size: int, order_seed: int | None) -> list[list[str]]:
    """The classes of each task; the last may have fewer."""
    order = in_order(train.labels, train.order)
    if order_seed is not None:
        order = shuffled(order, order_seed)
    return [order[start : start + size] for start in range(0, len(order), size)]


def _by_column(splits: Mapping[str, Dataset], column: str, name: str) -> tuple[list[list[str]], dict[str, np.ndarray]]:
    """(the domain of each task, the domain of each row)."""
    keys: dict[str, np.ndarray] = {}
    order: tuple[str, ...] = ()
    for split, data in splits.items():
        place = f"the {split} split of `{name}`"
        if column not in data.column_names:
            found = ", ".join(f"`{each}`" for each in data.column_names)
            raise StreamError(f"no column `{column}` to split {place} by; it has {found}")
        values, declared = column_texts(data, column)
        if any(value is None for value in values):
            raise StreamError(f"column `{column}` of {place} has nulls, so those rows have no task")
        keys[split] = np.array([str(value) for value in values], dtype=object)
        order = order or declared
    for split, present in keys.items():
        unseen = sorted(set(present) - set(keys["train"]))
        if unseen:
            raise StreamError(
                f"`{column}` is `{unseen[0]}` in the {split} split of `{name}` but nowhere in its train split"
            )
    return [[value] for value in in_order(keys["train"], order)], keys


def _names(groups: Sequence[Sequence[str]]) -> list[str]:
    """All labels of a task where that stays short ("0-1"), else the first and how many more; each name once."""
    names: list[str] = []
    for group in groups:
        name = "-".join(slug(label) for label in group)
        if len(name) > 32 and len(group) > 1:
            name = f"{slug(group[0])}-and-{len(group) - 1}-more"
        while name in names:  # labels may differ in case alone
            name = f"{name}-{len(names) + 1}"
        names.append(name)
    return names
