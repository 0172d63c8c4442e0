"""From files, folders and the Hub to `datasets.Dataset`, as they are; nothing is interpreted here."""

from __future__ import annotations

import errno
import glob
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.exceptions import DatasetNotFoundError, DatasetsError

from ..core.errors import StreamError
from .hashing import file_digest
from .image_folders import read_images
from .labels import label_text
from .origin import Origin
from .quiet import without_bars
from .text_files import decoded, read_texts

SPLITS = ("train", "test", "validation")
FORMATS = (".jsonl", ".json", ".csv", ".parquet")
LAYOUT = (
    "a stream is a folder of task folders, each with train.* and test.* "
    "(.jsonl, .csv, .parquet, or image folders train/<label>/*.png)"
)
# what `datasets` raises for files that it cannot read
_UNREADABLE = (DatasetsError, pa.ArrowException, ValueError, OSError, RuntimeError)


@dataclass(frozen=True)
class Card:
    """What a task folder says of itself in task.json, all of it optional."""

    name: str | None = None
    labels: tuple[str, ...] | None = None
    instruction: str | None = None
    training: dict[str, Any] = field(default_factory=dict)
    metric: str | None = None


def read_card(folder: Path) -> Card:
    """Read task.json; other keys are ignored.

    Raises:
        StreamError: it is not JSON, or a key has the wrong type.
    """
    path = folder / "task.json"
    if not path.is_file():
        return Card()
    try:
        card = json.loads(decoded(path))
    except (ValueError, OSError) as error:
        raise StreamError(f"cannot read {path}: {error}") from error
    if not isinstance(card, dict):
        raise StreamError(f"{path} must hold one JSON object with name, labels, instruction, training and metric")
    labels = card.get("labels")
    if labels is not None:
        if not isinstance(labels, list) or not labels:
            raise StreamError(f"`labels` in {path} must be a list of label texts, or left out")
        labels = tuple(label if isinstance(label, str) else label_text(label) for label in labels)
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise StreamError(f"`labels` in {path} lists `{twice[0]}` twice")
    for key in ("name", "instruction", "metric"):
        if not isinstance(card.get(key) or "", str):
            raise StreamError(f"`{key}` in {path} must be a text, or left out")
    training = card.get("training") or {}
    if not isinstance(training, dict):
        raise StreamError(f'`training` in {path} must hold settings, {{"num_train_epochs": 5}}, or be left out')
    return Card(card.get("name") or None, labels, card.get("instruction") or None, training, card.get("metric") or None)


def split_files(folder: Path) -> dict[str, list[Path]]:
    """The splits that a folder holds: {"train": [train.jsonl]}, shards train-*.parquet, or the image folder train/.

    Raises:
        StreamError: one split in several formats.
    """
    found: dict[str, list[Path]] = {}
    for split in SPLITS:
        by_kind: dict[str, list[Path]] = {}
        for path in sorted([*folder.glob(f"{split}.*"), *folder.glob(f"{split}-*.*")]):
            if path.suffix.lower() in FORMATS and path.is_file():
                by_kind.setdefault(path.suffix.lower(), []).append(path)
        if (folder / split).is_dir():
            by_kind["folder"] = [folder / split]
        if len(by_kind) > 1:
            names = ", ".join(path.name for paths in by_kind.values() for path in paths)
            raise StreamError(f"{folder} holds its {split} split in several formats ({names}): keep one")
        for paths in by_kind.values():
            found[split] = paths
    return found


@contextmanager
def _quietly() -> Iterator[None]:
    """No progress bars and no chatter of `datasets`, for as long as it lasts."""
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        with without_bars():
            yield
    finally:
        datasets.logging.set_verbosity(verbosity)


def read_files(paths: list[Path], place: str) -> datasets.Dataset:
    """The rows of one split alone; see `read_split`."""
    return read_split(paths, place)[0]


def read_split(paths: list[Path], place: str) -> tuple[datasets.Dataset, Origin]:
    """Read the files (or the image folder) of one split.

    CSV and JSON are held in memory. Converted Parquet files lie in the cache of `datasets` under the hash of their
    content, so what is read is what is on disk.

    Args:
        paths: files of one format, or one folder of images.
        place: "the train split of task `x`", for messages.

    Raises:
        StreamError: a file is empty, truncated or malformed, or the cache cannot be written.
    """
    try:
        if paths[0].is_dir():
            return read_images(paths[0], place)
        if paths[0].suffix.lower() != ".parquet":
            data, origin = read_texts(paths, place)
        else:
            data, origin = _read_parquet(paths, place)
        if not len(data):
            raise StreamError(f"{place} is empty: {paths[0]}")
        return data, origin
    except _UNREADABLE as error:
        cause = _root(error)
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT):
            raise StreamError(f"{cause} while reading {place}: set HF_DATASETS_CACHE to a writable folder") from error
        raise StreamError(f"cannot read {place}, {paths[0]} is truncated or malformed: {_line(cause)}") from error


def _read_parquet(paths: list[Path], place: str) -> tuple[datasets.Dataset, Origin]:
    counts = {path: pq.read_metadata(path).num_rows if path.stat().st_size else 0 for path in paths}
    filled = [path for path in paths if counts[path]]  # the builder of `datasets` stumbles over empty ones
    if not filled:
        return datasets.Dataset.from_dict({}), Origin(place)
    cache = str(Path(datasets.config.HF_DATASETS_CACHE) / "perpetune" / file_digest(filled)[:32])
    pattern = [glob.escape(str(path)) for path in filled]
    with _quietly():
        data = datasets.load_dataset("parquet", data_files={"train": pattern}, split="train", cache_dir=cache)
    for column in data.data.table.columns:
        column.validate(full=True)  # texts that other programs wrote need not be UTF-8
    return data, Origin(place, tuple((path, counts[path]) for path in filled))


def read_hub(source: str, test: str = "test") -> dict[str, datasets.Dataset]:
    """Read `owner/name` or `owner/name:configuration` from the Hub. Never runs code that comes with a dataset.

    Args:
        source: the dataset.
        test: what it calls the split that serves as test data.

    Raises:
        StreamError: there is no such dataset, it cannot be reached, or it needs code of its own.
    """
    name, _, configuration = source.partition(":")
    found = load_hub(name, configuration or None)
    names = {split: test if split == "test" else split for split in SPLITS}
    return {split: found[name] for split, name in names.items() if name in found}


def load_hub(path: str, configuration: str | None = None, **options: Any) -> Any:
    """What `datasets.load_dataset` makes of a dataset on the Hub; errors as in `read_hub`."""
    try:
        return datasets.load_dataset(path, configuration, **options)
    except DatasetNotFoundError as error:
        raise StreamError(f"no dataset `{path}` on the Hub, and no such folder or built-in: {_line(error)}") from error
    except (*_UNREADABLE, ImportError) as error:
        raise StreamError(f"cannot load `{path}` from the Hub: {_line(_root(error))}") from error


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
