"""Small streams written on the spot; the cache of `datasets` is a temporary folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import datasets
import pytest

Row = dict[str, object]


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    cache = tmp_path_factory.mktemp("datasets_cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        yield cache


def make_rows(labels: Sequence[str], each: int, start: int = 0) -> list[Row]:
    """`each` rows of every label, labels alternating, texts all different."""
    return [{"text": f"{label} number {start + i}", "label": label} for i in range(each) for label in labels]


def write_jsonl(path: Path, rows: Sequence[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def write_task(tmp_path: Path) -> Callable[..., Path]:
    """`write_task("a", ["x", "y"], train=20, test=8, card=None)`: the task folder `stream/a`, so many rows a label."""

    def write(name: str, labels: Sequence[str], train: int = 20, test: int = 8, card: object = None) -> Path:
        folder = tmp_path / "stream" / name
        write_jsonl(folder / "train.jsonl", make_rows(labels, train))
        write_jsonl(folder / "test.jsonl", make_rows(labels, test, start=1000))
        if card is not None:
            (folder / "task.json").write_text(json.dumps(card), encoding="utf-8")
        return folder

    return write


@pytest.fixture
def three_tasks(write_task: Callable[..., Path]) -> Path:
    """Tasks `animals`, `plants` and `stones` with three, two and two classes of their own."""
    write_task("plants", ["tree", "herb"])
    write_task("animals", ["cat", "dog", "bird"], card={"name": "Zoo", "labels": ["dog", "cat", "bird"]})
    return write_task("stones", ["granite", "basalt"], card={"instruction": "Which stone?"}).parent
