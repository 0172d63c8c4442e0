"""Rows of tokens, and tasks whose rows only a trainer had."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import datasets
import numpy as np
from datasets import Features, Value

from .task import Task

METRIC = "likelihood"  # of a task whose rows are tokens: exp(mean log p of the targets), the score of each example
SOURCE = "trainer"  # of a stream whose rows only a trainer has

FEATURES = Features(
    {
        "id": Value("string"),
        "label": Value("int64"),
        "input_ids": datasets.Sequence(Value("int64")),
        "targets": datasets.Sequence(Value("int64")),
    }
)


def as_rows(pairs: Iterable[tuple[Sequence[int], Sequence[int]]]) -> datasets.Dataset:
    """(input_ids, targets) of each text as a data set; targets are -100 where there is no loss."""
    made: dict[str, list[Any]] = {name: [] for name in FEATURES}
    for ids, targets in pairs:
        digest = hashlib.sha1(np.asarray([len(ids), *ids, *targets], dtype="<i8").tobytes(), usedforsecurity=False)
        for name, value in zip(FEATURES, (digest.hexdigest(), -1, list(ids), list(targets)), strict=True):
            made[name].append(value)
    return datasets.Dataset.from_dict(made, features=FEATURES)


def without_rows(name: str, classes: Sequence[int] = ()) -> Task:
    """A learned task whose rows only its trainer had."""
    nothing = as_rows([])
    return Task(name, tuple(classes), nothing, nothing, gone=("train", "test"), metric=METRIC)
