"""A folder of task folders, and which of its tasks are meant."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..core.errors import StreamError, nearest
from .formats import LAYOUT, Card, read_card, read_split, split_files
from .labels import label_text
from .rows import open_rows
from .splitting import Draft, slug


def task_folders(path: Path) -> list[Path]:
    """The folders in `path` that hold a split of any kind, in natural order."""
    folders = [child for child in path.iterdir() if child.is_dir() and not child.name.startswith(".")]
    return [folder for folder in sorted(folders, key=lambda folder: natural(folder.name)) if split_files(folder)]


def natural(name: str) -> tuple[object, ...]:
    """Sorts week-2 before week-10: numbers by value, all else as text."""
    parts = re.split(r"([0-9]+)", name)
    return (*(int(part) if i % 2 else part for i, part in enumerate(parts)), name)


def read_folder(path: Path, tasks: Sequence[str] | None, columns: Mapping[str, str] | None) -> list[Draft]:
    """Only the chosen tasks are read. Arguments as in `load_stream`.

    Raises:
        StreamError: no task folders, an unknown or repeated task, a missing or malformed split.
    """
    folders = [] if split_files(path) else task_folders(path)
    if not folders:
        raise StreamError(
            f"no task folder in {path}: {LAYOUT}. If this is one dataset, say how to divide it: "
            'split_by="class" with classes_per_task, or a column'
        )
    cards = [read_card(folder) for folder in folders]
    names = [slug(folder.name) for folder in folders]
    aliases = [{f.name, n, c.name or n} for f, n, c in zip(folders, names, cards, strict=True)]
    chosen = choose(tasks, names, aliases, str(path))
    claimed: dict[str, int] = {}
    for i in chosen:
        for alias in sorted({alias.lower() for alias in aliases[i]}):
            if claimed.setdefault(alias, i) != i:
                other = folders[claimed[alias]].name
                raise StreamError(
                    f"the same task twice: `{other}` and `{folders[i].name}` in {path} are both called `{alias}`"
                )
    return [_draft(folders[i], names[i], cards[i], columns) for i in chosen]


def _draft(folder: Path, name: str, card: Card, columns: Mapping[str, str] | None) -> Draft:
    files = split_files(folder)
    for split in ("train", "test"):
        if split not in files:
            found = ", ".join(path.name for paths in files.values() for path in paths)
            raise StreamError(f"task `{name}` has no {split} split: put {split}.* beside {found} in {folder}")
    splits = {}
    for split, paths in files.items():
        data, origin = read_split(paths, f"the {split} split of task `{name}`")
        splits[split] = open_rows(data, origin, columns, folder)
    labels = card.labels
    if labels is not None and not splits["train"].free_texts:
        labels = tuple(dict.fromkeys(map(label_text, labels)))
    return Draft(name, splits, labels, card.instruction, card.training)


def choose(tasks: Sequence[str] | None, names: Sequence[str], aliases: Sequence[set[str]], stream: str) -> list[int]:
    """Which tasks are meant, in the order asked for.

    Args:
        tasks: names in any case; None for all tasks.
        names: (T,) names of the tasks; a task called exactly so goes before one that is also known as it.
        aliases: (T,) what each task is also known as.
        stream: for messages.

    Raises:
        StreamError: a name that no task has, that several have, or that is listed twice.
    """
    if tasks is None:
        return list(range(len(names)))
    known = [{alias.lower() for alias in (name, *also)} for name, also in zip(names, aliases, strict=True)]
    chosen: list[int] = []
    for task in tasks:
        wanted = str(task).lower()
        hits = [i for i, name in enumerate(names) if name == wanted] or [i for i, k in enumerate(known) if wanted in k]
        if not hits:
            raise StreamError(f"no task `{task}` in `{stream}`: {nearest(wanted, set().union(*known))}")
        if len(hits) > 1:
            raise StreamError(f"`{task}` names {len(hits)} tasks of `{stream}`: use the names of their folders")
        if hits[0] in chosen:
            raise StreamError(f"the same task twice: `{task}` is listed twice for `{stream}`")
        chosen += hits
    return chosen
