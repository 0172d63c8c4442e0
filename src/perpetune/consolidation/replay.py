"""A few examples of every class are kept and trained on again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import datasets
from datasets.table import embed_table_storage

from .base import Files, Session, StoredFiles, positive
from .continue_ import Continue

MEMORY = "memory.parquet"


@dataclass
class Replay(Continue):
    """Keep `per_class` examples of every class, or of every task of free texts, and mix them into the training rows of
    later tasks.

    The examples are those with the smallest content hash, so that the choice depends on neither order nor seed. They
    are stored in the commits, in plain: use it only where they may be kept.
    """

    per_class: int = 10
    _kept: list[datasets.Dataset] = field(default_factory=list, init=False, repr=False, compare=False)
    _new: datasets.Dataset = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        positive("per_class", self.per_class)

    def rows(self, session: Session) -> datasets.Dataset:
        return datasets.concatenate_datasets([super().rows(session), *self._kept])

    def classes(self, session: Session) -> tuple[int, ...]:
        old = (c for kept in self._kept for c in kept["label"] if c >= 0)  # free texts have no class
        return tuple(dict.fromkeys([*session.classes, *old]))

    def reads(self, learned_in: int, now: int) -> int:
        return now  # kept examples go on training the rows of old classes

    def end_task(self, session: Session) -> None:
        super().end_task(session)
        rows = super().rows(session)
        by_class: dict[int, list[tuple[str, int]]] = {}
        for i, (sample, label) in enumerate(zip(rows["id"][:], rows["label"][:], strict=True)):
            by_class.setdefault(label, []).append((hashlib.sha256(sample.encode()).hexdigest(), i))
        chosen = sorted(i for group in by_class.values() for _, i in sorted(group)[: self.per_class])
        # pictures themselves, not the paths they were read from: the memory must outlive the stream's folder
        table = embed_table_storage(_flat(rows.select(chosen)).data.table)
        self._new = datasets.Dataset(table)
        self._kept.append(self._new)

    def files(self) -> Files:
        return {**super().files(), MEMORY: self._new}

    def restore(self, commits: Sequence[StoredFiles]) -> None:
        super().restore(commits)
        self._kept = [commit.rows(MEMORY) for commit in commits]


def _flat(rows: datasets.Dataset) -> datasets.Dataset:
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return rows.flatten_indices()
    finally:
        if shown:
            datasets.enable_progress_bars()
