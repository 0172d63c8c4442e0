"""Folders of tasks: what is read, in which order, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from perpetune.core.errors import ConfigError, StreamError
from perpetune.streams import fingerprint, load_stream

WriteTask = Callable[..., Path]


def test_a_folder_is_a_stream(three_tasks: Path) -> None:
    stream = load_stream(three_tasks)
    assert stream.name == "stream" and stream.scenario == "class" and stream.inputs == ("text",)
    assert [task.name for task in stream] == ["animals", "plants", "stones"]
    # task.json's order where there is one, else sorted
    assert stream.labels == ("dog", "cat", "bird", "herb", "tree", "basalt", "granite")
    assert [task.classes for task in stream] == [(0, 1, 2), (3, 4), (5, 6)]
    animals = stream.tasks[0]
    assert animals.train.column_names == ["id", "label", "text"]
    assert len(animals.train) == 60 and len(animals.test) == 24 and animals.validation is None
    for row in animals.train:
        assert row["text"].split()[0] == stream.labels[row["label"]]
    assert [task.instruction for task in stream] == [None, None, "Which stone?"]


def test_tasks_are_named_in_any_case_and_ordered(three_tasks: Path) -> None:
    stream = load_stream(three_tasks, tasks=["STONES", "zoo"])
    assert [task.name for task in stream] == ["stones", "animals"]
    assert stream.labels == ("basalt", "granite", "dog", "cat", "bird")


def test_a_stream_loads_again_from_its_source(three_tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(three_tasks.parent)
    arguments = {"train_limit": 10, "test_limit": 5, "validation_share": 0.2, "seed": 3, "order_seed": 1}
    stream = load_stream("stream", scenario="task", name="my stream", columns={"none": "text"}, **arguments)
    monkeypatch.chdir("/")
    again = load_stream(**json.loads(json.dumps(stream.source)))
    assert [fingerprint(t) for t in again] == [fingerprint(t) for t in stream]
    assert (again.name, again.scenario, again.labels) == ("my stream", "task", stream.labels)
    assert [t.name for t in again] == [t.name for t in stream] and again.source == stream.source


def test_an_order_seed_shuffles_the_tasks(three_tasks: Path) -> None:
    orders = {tuple(t.name for t in load_stream(three_tasks, order_seed=seed)) for seed in range(3)}
    assert len(orders) > 1 and all(sorted(order) == ["animals", "plants", "stones"] for order in orders)


def test_every_format_gives_the_same_ids_and_labels(write_task: WriteTask, tmp_path: Path) -> None:
    folder = write_task("a", ["007", "None"])
    jsonl = load_stream(folder.parent)
    train, test = (pd.read_json(folder / f"{s}.jsonl", lines=True, dtype=False) for s in ("train", "test"))
    csv, parquet = tmp_path / "csv" / "a", tmp_path / "parquet" / "a"
    for other in (csv, parquet):
        other.mkdir(parents=True)
    train.to_csv(csv / "train.csv", index=False)
    test.to_csv(csv / "test.csv", index=False)
    train[:11].to_parquet(parquet / "train-00000-of-00002.parquet")
    train[11:].to_parquet(parquet / "train-00001-of-00002.parquet")
    test.to_parquet(parquet / "test.parquet")
    for other in (csv, parquet):
        stream = load_stream(other.parent)
        assert stream.labels == jsonl.labels == ("007", "None")
        assert fingerprint(stream.tasks[0]) == fingerprint(jsonl.tasks[0])


def test_image_folders(tmp_path: Path) -> None:
    folder = tmp_path / "weird [1] names" / "Symbols (new)"
    for split, count in (("train", 3), ("test", 1)):
        for shade, label in ((10, "dark"), (200, "light")):
            (folder / split / label).mkdir(parents=True)
            for i in range(count):
                Image.new("L", (5, 4), shade + i).save(folder / split / label / f"{i}.png")
    stream = load_stream(folder.parent)
    assert stream.inputs == ("image",) and [t.name for t in stream] == ["symbols_new"]
    assert stream.labels == ("dark", "light")
    for row in stream.tasks[0].train:
        assert row["image"].size == (5, 4)
        assert (np.asarray(row["image"]).max() > 100) == (stream.labels[row["label"]] == "light")
    (folder / "train" / "dark" / "1.png").write_bytes(b"no image")
    with pytest.raises(StreamError, match="holds no readable image"):
        load_stream(folder.parent)


def test_text_pairs_and_renamed_columns(tmp_path: Path) -> None:
    rows = [{"premise": f"p{i}", "hypothesis": f"h{i}", "gold": i % 2, "text": "note"} for i in range(10)]
    for split in ("train", "test"):
        path = tmp_path / "s" / "nli" / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(map(json.dumps, rows)))
    names = {"premise": "text", "hypothesis": "text_pair", "gold": "label"}
    stream = load_stream(tmp_path / "s", columns=names)
    assert stream.inputs == ("text", "text_pair") and stream.labels == ("0", "1")
    row = stream.tasks[0].train[3]
    assert (row["text"], row["text_pair"], row["label"]) == ("p3", "h3", 1)
    assert stream.source["columns"] == names


def test_a_changed_file_is_read_anew_even_with_its_old_size_and_date(write_task: WriteTask) -> None:
    import os

    path = write_task("a", ["x", "y"]) / "train.jsonl"
    before, date = load_stream(path.parents[1]), path.stat()
    path.write_text(path.read_text().replace("number 7", "number 9"))
    os.utime(path, ns=(date.st_atime_ns, date.st_mtime_ns))
    assert path.stat().st_size == date.st_size
    after = load_stream(path.parents[1])
    assert sum("number 9" in text for text in after.tasks[0].train["text"]) == 4
    assert fingerprint(after.tasks[0]) != fingerprint(before.tasks[0])


def test_loading_is_quiet_and_leaves_progress_bars_alone(three_tasks: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import datasets

    datasets.enable_progress_bars()
    load_stream(three_tasks)
    assert not datasets.are_progress_bars_disabled()
    assert capfd.readouterr() == ("", "")


def test_a_missing_folder_names_its_neighbours(three_tasks: Path) -> None:
    with pytest.raises(StreamError, match="no folder .*did you mean `stream`"):
        load_stream(three_tasks.with_name("straem"))


def test_a_folder_without_tasks_explains_the_layout(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    with pytest.raises(StreamError, match=r"no task folder in .*each with train\.\* and test\.\*"):
        load_stream(tmp_path)


def test_one_dataset_is_no_stream(write_task: WriteTask) -> None:
    with pytest.raises(StreamError, match='split_by="class" with classes_per_task'):
        load_stream(write_task("a", ["x"]))


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_missing_split(three_tasks: Path, split: str) -> None:
    (three_tasks / "plants" / f"{split}.jsonl").unlink()
    with pytest.raises(StreamError, match=f"task `plants` has no {split} split"):
        load_stream(three_tasks)
    assert len(load_stream(three_tasks, tasks=["animals", "stones"])) == 2  # what is not asked for is not read


def test_a_split_in_two_formats(three_tasks: Path) -> None:
    (three_tasks / "plants" / "train.csv").write_text("text,label\nx,tree\n")
    with pytest.raises(StreamError, match=r"several formats \(train.csv, train.jsonl\)"):
        load_stream(three_tasks)


def test_an_unknown_task_gets_the_nearest_names(three_tasks: Path) -> None:
    with pytest.raises(StreamError, match="no task `animal` .*did you mean `animals`"):
        load_stream(three_tasks, tasks=["animal"])


def test_the_same_task_twice(three_tasks: Path, write_task: WriteTask) -> None:
    with pytest.raises(StreamError, match="the same task twice: `ZOO`"):
        load_stream(three_tasks, tasks=["animals", "ZOO"])
    write_task("menagerie", ["cat", "dog"], card={"name": "zoo"})
    with pytest.raises(StreamError, match="the same task twice: `animals` and `menagerie` .* both called `zoo`"):
        load_stream(three_tasks)
    with pytest.raises(StreamError, match="`Zoo` names 2 tasks"):
        load_stream(three_tasks, tasks=["Zoo"])
    assert len(load_stream(three_tasks, tasks=["animals", "stones"])) == 2


def test_tasks_must_be_a_list(three_tasks: Path) -> None:
    for tasks in ("animals", []):
        with pytest.raises(ConfigError, match="list of at least one"):
            load_stream(three_tasks, tasks=tasks)


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("{not json", "cannot read .*task.json"),
        ("[]", "one JSON object"),
        ('{"labels": "tree"}', "`labels` .* must be a list"),
        ('{"labels": ["tree", "herb", "tree"]}', "lists `tree` twice"),
        ('{"name": 3}', "`name` .* must be a text"),
    ],
)
def test_a_broken_task_json(three_tasks: Path, card: str, message: str) -> None:
    (three_tasks / "plants" / "task.json").write_text(card)
    with pytest.raises(StreamError, match=message):
        load_stream(three_tasks)


def test_a_task_of_another_format_is_not_passed_over(three_tasks: Path) -> None:
    (three_tasks / "plants" / "train.jsonl").rename(three_tasks / "plants" / "train.JSONL")
    assert len(load_stream(three_tasks)) == 3
    (three_tasks / "fish").mkdir()
    (three_tasks / "fish" / "notes.md").write_text("no task", encoding="utf-8")
    assert len(load_stream(three_tasks)) == 3
    (three_tasks / "fish" / "train.tsv").write_text("text\tlabel\n", encoding="utf-8")
    with pytest.raises(StreamError, match=r"fish/train.tsv is of a format that is not read: convert it \(.jsonl"):
        load_stream(three_tasks)
