"""Files that cannot be read, and code that must not be run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import datasets
import pandas as pd
import pytest

from perpetune.core.errors import ConfigError, StreamError
from perpetune.streams import load_stream

WriteTask = Callable[..., Path]


def test_a_truncated_jsonl_file(write_task: WriteTask) -> None:
    path = write_task("a", ["x", "y"]) / "train.jsonl"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(StreamError, match="cannot read the train split of task `a`, .*train.jsonl is truncated"):
        load_stream(path.parents[1])


def test_a_truncated_parquet_file(write_task: WriteTask) -> None:
    folder = write_task("a", ["x", "y"])
    whole = folder / "train.parquet"
    pd.read_json(folder / "train.jsonl", lines=True).to_parquet(whole)
    (folder / "train.jsonl").unlink()
    assert len(load_stream(folder.parent).tasks[0].train) == 40
    whole.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(StreamError, match="train.parquet is truncated or malformed"):
        load_stream(folder.parent)


def test_a_csv_file_that_is_no_text(write_task: WriteTask) -> None:
    folder = write_task("a", ["x", "y"])
    (folder / "train.jsonl").unlink()
    (folder / "train.csv").write_bytes(b"text,label\n\xff\xfe\x00,x\n")
    with pytest.raises(StreamError, match="train.csv is truncated or malformed"):
        load_stream(folder.parent)


@pytest.mark.parametrize(("name", "content"), [("test.jsonl", ""), ("test.csv", ""), ("test.csv", "text,label\n")])
def test_an_empty_file(write_task: WriteTask, name: str, content: str) -> None:
    folder = write_task("a", ["x", "y"])
    (folder / "test.jsonl").unlink()
    (folder / name).write_text(content)
    with pytest.raises(StreamError, match="the test split of task `a` is empty"):
        load_stream(folder.parent)


def test_an_empty_parquet_file_and_image_folder(write_task: WriteTask) -> None:
    folder = write_task("a", ["x", "y"])
    (folder / "test.jsonl").unlink()
    pd.DataFrame({"text": pd.Series(dtype="str"), "label": pd.Series(dtype="str")}).to_parquet(folder / "test.parquet")
    with pytest.raises(StreamError, match="the test split of task `a` is empty"):
        load_stream(folder.parent)
    (folder / "test.parquet").unlink()
    (folder / "test").mkdir()
    with pytest.raises(StreamError, match="the test split of task `a` is empty"):
        load_stream(folder.parent)


def test_a_cache_that_cannot_be_written_is_not_blamed_on_the_file(
    write_task: WriteTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **options: object) -> None:
        raise datasets.exceptions.DatasetGenerationError("failed") from OSError(28, "No space left on device")

    folder = write_task("a", ["x", "y"])
    pd.read_json(folder / "train.jsonl", lines=True).to_parquet(folder / "train.parquet")
    (folder / "train.jsonl").unlink()
    monkeypatch.setattr(datasets, "load_dataset", full)
    with pytest.raises(StreamError, match="No space left on device .* set HF_DATASETS_CACHE"):
        load_stream(folder.parent)


def test_code_beside_the_data_is_never_run(write_task: WriteTask, tmp_path: Path) -> None:
    folder = write_task("a", ["x", "y"])
    for where in (folder, folder.parent):
        (where / f"{where.name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    load_stream(folder.parent)
    load_stream(folder, split_by="class", classes_per_task=1)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ConfigError, match="never runs code"):
        load_stream(folder.parent, trust_remote_code=True)


def test_an_unknown_name_gets_the_nearest_builtin() -> None:
    with pytest.raises(StreamError, match="no stream `digit`.*did you mean `digits`.*Hub needs split_by"):
        load_stream("digit")


def test_the_hub_is_asked_only_for_a_dataset_to_divide(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, configuration: str | None) -> datasets.DatasetDict:
        asked.append((name, configuration))
        rows = [{"sentence": f"{y} {i}", "label": y} for i in range(10) for y in range(4)]
        return datasets.DatasetDict(train=datasets.Dataset.from_list(rows), unsupervised=datasets.Dataset.from_list([]))

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(StreamError, match="Hub needs split_by"):
        load_stream("owner/name:small")
    assert asked == []
    stream = load_stream("owner/name:small", split_by="class", classes_per_task=2, columns={"sentence": "text"})
    assert asked == [("owner/name", "small")] and stream.name == "owner_name_small"
    assert [(t.name, len(t.train), len(t.test)) for t in stream] == [("0-1", 16, 4), ("2-3", 16, 4)]
    assert stream.source["source"] == "owner/name:small"


def test_a_hub_dataset_that_is_not_there() -> None:
    with pytest.raises(StreamError, match="perpetune-no-such/dataset"):
        load_stream("perpetune-no-such/dataset", split_by="class", classes_per_task=2)
