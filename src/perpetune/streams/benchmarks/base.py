"""What a named benchmark is: published tasks in their published order, read from the data that a person has."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Features, Value

from ...core.errors import ConfigError, StreamError
from ..folder import choose
from ..rows import Rows, open_rows
from ..splitting import Draft


class MissingData(StreamError):
    """Data of a benchmark is not given or not where it should be; `Benchmark.read` adds how to get it."""


@dataclass(frozen=True)
class Benchmark:
    """A published stream under a name of its own.

    Attributes:
        name: what `load_stream` knows it by.
        summary: one line, for `perpetune list benchmarks`.
        paper: the source of its tasks and their order, as an arXiv number or a citation.
        get: where a person gets the data, and in which layout it is read; stands in the error when it is missing.
        drafts: (data folder, or None: from the Hub where a safe copy is known; classes a task, or None for the
            published number) -> the tasks in their published order. Raises `MissingData` where there is nothing to
            read; splits that are `Lazy` are read for the tasks that are chosen alone.
        options: arguments of `load_stream` that are different here unless they are given.
        sizes: task -> (training rows, test rows) as published; other sizes are warned of.
    """

    name: str
    summary: str
    paper: str
    get: str
    drafts: Callable[[Path | None, int | None], list[Draft]]
    options: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def read(self, data: Path | None, classes_per_task: int | None, tasks: Sequence[str] | None) -> list[Draft]:
        """The chosen tasks, from the folder `data`, or from the Hub. Arguments as in `load_stream`.

        Raises:
            StreamError: the data is missing, which says how to get it, or malformed; a task that there is not.
            ConfigError: `classes_per_task` for tasks that are not divided by class.
        """
        try:
            if data is not None and not data.is_dir():
                raise MissingData(f"there is no folder {data}")
            drafts = self.drafts(data, classes_per_task)
            names = [draft.name for draft in drafts]
            chosen = [drafts[i] for i in choose(tasks, names, [set()] * len(names), self.name)]
            drafts = [replace(draft, splits=dict(draft.splits)) for draft in chosen]
        except MissingData as error:
            raise StreamError(f"benchmark `{self.name}`: {error}. {self.get}") from error
        self._check_sizes(drafts)
        return drafts

    def _check_sizes(self, drafts: Sequence[Draft]) -> None:
        odd = []
        for draft in drafts:
            found = (len(draft.splits["train"]), len(draft.splits["test"]))
            if found != self.sizes.get(draft.name, found):
                odd.append("{} {}/{} of {}/{}".format(draft.name, *found, *self.sizes[draft.name]))
        if odd:
            warnings.warn(
                f"`{self.name}` is not of its published size, so its figures are not to be compared with published "
                f"ones (train/test rows: {', '.join(odd)})",
                stacklevel=4,  # the caller of `load_stream`
            )


class Lazy(Mapping[str, Rows]):
    """The splits of a task, read when they are first asked for: what is not chosen need not be there."""

    def __init__(self, read: Callable[[], dict[str, Rows]]) -> None:
        self._read = read

    @cached_property
    def _splits(self) -> dict[str, Rows]:
        return self._read()

    def __getitem__(self, split: str) -> Rows:
        return self._splits[split]

    def __iter__(self) -> Iterator[str]:
        return iter(self._splits)

    def __len__(self) -> int:
        return len(self._splits)


def needed(path: Path, *more: Path) -> Path:
    """The first path; all of them are there.

    Raises:
        MissingData: some are not, all of which it names.
    """
    missing = [str(each) for each in (path, *more) if not each.exists()]
    if missing:
        raise MissingData(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    return path


def fetched(read: Callable[[], Any]) -> Any:
    """What `read` finds on the Hub.

    Raises:
        MissingData: it finds nothing, or no Hub.
    """
    try:
        return read()
    except StreamError as error:
        raise MissingData(str(error)) from error


def not_divided(benchmark: str, classes_per_task: int | None) -> None:
    """Raises ConfigError if classes are to be dealt to the tasks of a benchmark whose tasks are whole datasets."""
    if classes_per_task is not None:
        raise ConfigError(f"the tasks of `{benchmark}` are whole datasets: leave classes_per_task out")


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        StreamError: it cannot be read, or is no JSON.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if text.startswith("version https://git-lfs"):
            raise StreamError(f"{path} is a pointer of Git LFS, not the file: fetch it with `git lfs pull`")
        return json.loads(text)
    except (ValueError, OSError) as error:
        raise StreamError(f"cannot read {path}, it is truncated or malformed: {error}") from error


def read_list(path: Path, *keys: str) -> list[tuple[str, ...]]:
    """A JSON list of objects, of each the values of these keys as text.

    Raises:
        StreamError: it is no such list, or an object lacks a key.
    """
    rows = read_json(path)
    if not isinstance(rows, list):
        raise StreamError(f"{path} must hold one JSON list of objects with {' and '.join(keys)}")
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or any(row.get(key) is None for key in keys):
            raise StreamError(f"row {i} of {path} is no object with {' and '.join(keys)}")
    return [tuple(str(row[key]) for key in keys) for row in rows]


def text_rows(texts: Sequence[str], labels: Sequence[str], options: Sequence[str], place: str) -> Rows:
    """Labelled texts as rows; `options` are the label texts in the order in which a prompt names them."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(options))})
    return open_rows(Dataset.from_dict({"text": list(texts), "label": list(labels)}, features=features), place)
