"""A folder of task folders, and which of its tasks are meant."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..core.errors import StreamError, nearest
from .formats import FORMATS, LAYOUT, SPLITS, Card, read_card, read_split, split_files
from .labels import label_text
from .origin import warn
from .rows import open_rows
from .splitting import Draft, slug

OTHER_FORMATS = frozenset(
    ".tsv .txt .xls .xlsx .ods .xml .yaml .arrow .feather .orc .avro .npy .npz .h5 .gz .bz2 .xz .zst .zip .tar".split()
)


def task_folders(path: Path) -> list[Path]:
    """The folders in `path` that hold a split of any kind, in natural order.

    Raises:
        StreamError: a folder holds splits of a format that is not read alone.
    """
    folders = [child for child in path.iterdir() if child.is_dir() and not child.name.startswith(".")]
    found = []
    for folder in sorted(folders, key=lambda folder: natural(folder.name)):
        if split_files(folder):
            found.append(folder)
            continue
        strange = [f for split in SPLITS for f in folder.glob(f"{split}*.*") if f.suffix.lower() in OTHER_FORMATS]
        if strange:  # a task that nobody would miss
            raise StreamError(f"{strange[0]} is of a format that is not read: convert it ({', '.join(FORMATS)})")
        if not any(folder.iterdir()):
            warn(f"{folder} is empty, and no task: {LAYOUT}")
    return found


def natural(name: str) -> tuple[tuple[int | str, ...], str]:
    """Sorts week-2 before week-10: numbers by value, all else as text."""
    parts = re.split(r"([0-9]+)", name)
    return tuple(int(part) if i % 2 else part for i, part in enumerate(parts)), name


def read_folder(
    path: Path, tasks: Sequence[str] | None, columns: Mapping[str, str] | None, learned: Collection[str] = ()
) -> list[Draft]:
    """Only the chosen tasks are read. Arguments as in `load_stream`.

    Raises:
        StreamError: no task folders, an unknown or repeated task, a missing or malformed split.
    """
    folders = [] if split_files(path) else task_folders(path)
    if not folders:
        raise StreamError(
            f"no task folder in {path}: {LAYOUT}. If this is a task, give the folder above it; if it is one dataset, "
            'say how to divide it: split_by="class" with classes_per_task, or a column'
        )
    lost = set(learned) - {slug(folder.name) for folder in folders}
    folders = sorted([*folders, *(path / name for name in lost)], key=lambda folder: natural(folder.name))
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
    return _filled([_draft(folders[i], names[i], cards[i], columns, names[i] in learned) for i in chosen], path)


def _filled(drafts: list[Draft], path: Path) -> list[Draft]:
    """The drafts with empty splits where data is gone."""
    some = next((rows for draft in drafts for rows in draft.splits.values()), None)
    if some is None:
        raise StreamError(f"the data of all tasks in {path} is gone ({', '.join(draft.name for draft in drafts)})")
    nothing = some.pick(np.array([], dtype=np.int64))
    filled = []
    for draft in drafts:
        empty = {split: replace(nothing, place=f"the {split} split of task `{draft.name}`") for split in draft.gone}
        filled.append(replace(draft, splits={**empty, **draft.splits}))
    return filled


def _draft(folder: Path, name: str, card: Card, columns: Mapping[str, str] | None, learned: bool) -> Draft:
    files = split_files(folder)
    gone = []
    for split in ("train", "test") if learned else ():
        if not any(path.is_dir() or path.stat().st_size for path in files.get(split, ())):
            files.pop(split, None)
            gone.append(split)
    for split in ("train", "test"):
        if split not in files and split not in gone:
            found = ", ".join(path.name for paths in files.values() for path in paths)
            raise StreamError(f"task `{name}` has no {split} split: put {split}.* beside {found} in {folder}")
    splits = {}
    for split, paths in files.items():
        data, origin = read_split(paths, f"the {split} split of task `{name}`")
        splits[split] = open_rows(data, origin, columns, folder)
    labels = card.labels
    if labels is not None and not any(rows.free_texts for rows in splits.values()):
        labels = tuple(dict.fromkeys(map(label_text, labels)))
    return Draft(name, splits, labels, card.instruction, card.training, tuple(gone), card.metric)


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
