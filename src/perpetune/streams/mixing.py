"""Generic replay (2603.04964): examples of no task, mixed into the training rows of every task."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from datasets import Dataset, Features, concatenate_datasets

from ..core.errors import ConfigError, StreamError
from ..core.paths import local_path
from .conversations import Conversation
from .formats import FORMATS, read_hub, read_split, split_files
from .origin import Origin
from .rows import Rows, open_rows
from .sampling import generator
from .task import Task

SHARE = 0.1


def mixed(
    tasks: Sequence[Task],
    source: str | os.PathLike[str],
    share: float,
    seed: int,
    columns: Mapping[str, str] | None = None,
) -> tuple[Task, ...]:
    """The tasks of free texts with m = round(n share / (1 - share)) generic examples behind their n training rows: in
    training, which shuffles them, `share` of all rows is generic. Test data stays as it is.

    Every task draws its own by `seed` and its name, without repeats as long as there are enough. Plain texts stay texts
    that answer nothing; prompts become conversations where the tasks are conversations.

    Args:
        source: a file, a folder with a train split, or a Hub id.
        columns: new names of columns, as for the stream.

    Raises:
        ConfigError: a share outside of (0, 1); tasks of classes, whose responses these examples have not.
        StreamError: the examples cannot be read, or do not fit the tasks.
    """
    if not 0 < share < 1:
        raise ConfigError(f"mix_share must lie between 0 and 1, not {share!r}")
    classes = next((task.name for task in tasks if task.metric is None), None)
    if classes is not None:
        raise ConfigError(
            f"mix is for tasks of free texts, and the responses of task `{classes}` are classes: name a metric "
            "(--metric)"
        )
    rows = _read(source, columns)
    made = []
    for task in tasks:
        count = round(len(task.train) * share / (1 - share))
        order: list[int] = []
        while len(order) < count:
            order += generator(seed, task.name, "mix", len(order)).permutation(len(rows)).tolist()
        drawn = _as(rows, task.train.features)
        train = concatenate_datasets([task.train, drawn.select(order[:count])]) if count else task.train
        made.append(replace(task, train=train))
    return tuple(made)


def _read(source: str | os.PathLike[str], columns: Mapping[str, str] | None) -> Rows:
    path, place = local_path(source), f"the generic examples `{source}`"
    if path.exists():
        paths = split_files(path).get("train", []) if path.is_dir() else [path]
        if not paths or path.suffix.lower() not in (*FORMATS, ""):
            raise StreamError(f"{path} has no train split and is no file that can be read ({', '.join(FORMATS)})")
        data, origin = read_split(paths, place)
    else:
        data, origin = read_hub(os.fspath(source)).get("train", Dataset.from_dict({})), Origin(place)
    known = dict(columns or {})
    if "text" in data.column_names and "label" not in data.column_names:
        known.setdefault("text", "response")
    rows = open_rows(data, origin, known)
    if not rows.free_texts or rows.captions:
        raise StreamError(f"{place} must hold prompts and responses, conversations, or texts without labels")
    return rows


def _as(rows: Rows, features: Features) -> Dataset:
    """The rows with the columns of a task: `id`, `label`, its input and `response`."""
    if "image" in features:
        raise ConfigError("mix is for tasks without images: leave it out")
    column = "messages" if "messages" in features else "prompt"
    have = rows.data.column_names[0]
    asked = rows.data[have][:]
    if have != column:
        if column != "messages":
            raise StreamError(f"{rows.place} are conversations, and the tasks have prompts: write both alike")
        asked = [Conversation([{"role": "user", "content": text}]).written() if text else "" for text in asked]
    data = rows.finish({label: 0 for label in rows.labels})
    columns = {"id": data["id"][:], "label": [-1] * len(rows), column: asked, "response": list(map(str, rows.labels))}
    return Dataset.from_dict({name: columns[name] for name in features}, features=features)
