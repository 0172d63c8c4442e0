"""One labelled dataset made into tasks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from perpetune.core.errors import ConfigError, StreamError
from perpetune.streams import fingerprint, load_stream
from perpetune.streams.splitting import slug

WriteTask = Callable[..., Path]
LETTERS = ["a", "b", "c", "d", "e"]


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """One file: 3 shops x 2 labels x 10 reviews."""
    rows = [
        {"text": f"{shop} {i}", "label": "good" if i % 2 else "bad", "shop": shop}
        for i in range(20)
        for shop in ("Zoo", "Book & Pen", "Food")
    ]
    path = tmp_path / "reviews.v2.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_by_class(write_task: WriteTask) -> None:
    stream = load_stream(write_task("letters", LETTERS), split_by="class", classes_per_task=2)
    assert stream.name == "letters" and stream.scenario == "class"
    assert [(t.name, t.classes) for t in stream] == [("a-b", (0, 1)), ("c-d", (2, 3)), ("e", (4,))]
    for task in stream:
        assert Counter(task.train["label"]) == dict.fromkeys(task.classes, 20)
        assert Counter(task.test["label"]) == dict.fromkeys(task.classes, 8)
        assert all(text[0] == stream.labels[y] for text, y in zip(task.train["text"], task.train["label"], strict=True))


def test_by_class_in_a_seeded_order_loads_again(write_task: WriteTask) -> None:
    folder = write_task("letters", LETTERS)
    options = {"split_by": "class", "classes_per_task": 2, "test_limit": 5}
    stream = load_stream(folder, order_seed=3, **options)
    assert sorted(stream.labels) == LETTERS and stream.labels != tuple(LETTERS)
    last = load_stream(folder, order_seed=3, tasks=[stream.tasks[2].name, stream.tasks[0].name], **options)
    assert [t.name for t in last] == [stream.tasks[2].name, stream.tasks[0].name]
    for made in (stream, last):
        again = load_stream(**made.source)
        assert again.labels == made.labels and again.source == made.source
        assert [fingerprint(t) for t in again] == [fingerprint(t) for t in made]


def test_by_column_with_a_test_share(reviews: Path) -> None:
    stream = load_stream(reviews, split_by="shop", test_share=0.3)
    assert stream.name == "reviews.v2" and stream.scenario == "domain" and stream.labels == ("bad", "good")
    assert [t.name for t in stream] == ["book_pen", "food", "zoo"]
    for task in stream:
        assert Counter(task.train["label"]) == {0: 7, 1: 7} and Counter(task.test["label"]) == {0: 3, 1: 3}
        assert not set(task.train["id"]) & set(task.test["id"])
        assert {slug(text.rsplit(" ", 1)[0]) for text in task.train["text"]} == {task.name}
    assert set(load_stream(reviews, split_by="shop", seed=1).tasks[0].test["id"]) != set(
        load_stream(reviews, split_by="shop").tasks[0].test["id"]
    )


def test_by_column_tasks_are_chosen_and_shuffled(reviews: Path) -> None:
    chosen = load_stream(reviews, split_by="shop", tasks=["ZOO", "food"])
    assert [t.name for t in chosen] == ["zoo", "food"]
    orders = {tuple(t.name for t in load_stream(reviews, split_by="shop", order_seed=s)) for s in range(5)}
    assert len(orders) > 1
    shuffled = load_stream(reviews, split_by="shop", order_seed=2)
    assert [t.name for t in load_stream(**shuffled.source)] == [t.name for t in shuffled]


def test_images_in_one_folder_a_label(tmp_path: Path) -> None:
    for shade, label in enumerate(LETTERS):
        (tmp_path / "letters" / label).mkdir(parents=True)
        for i in range(5):
            Image.new("L", (3, 3), 10 * shade + i).save(tmp_path / "letters" / label / f"{i}.png")
    stream = load_stream(tmp_path / "letters", split_by="class", classes_per_task=3)
    assert stream.labels == tuple(LETTERS)
    assert [(t.name, len(t.train), len(t.test)) for t in stream] == [("a-b-c", 12, 3), ("d-e", 8, 2)]


@pytest.mark.filterwarnings("ignore:label")
def test_names_are_safe_short_and_unique(tmp_path: Path) -> None:
    assert slug("Japanese_(katakana)") == "japanese_katakana"
    assert slug("../..") == "task" and "/" not in slug("a/b\\c")
    path = tmp_path / "x.csv"
    long = [f"a label with a long name {i}" for i in range(4)]
    path.write_text("text,label\n" + "".join(f"{label} {i},{label}\n" for label in ["A", "a", *long] for i in range(5)))
    names = [t.name for t in load_stream(path, split_by="class", classes_per_task=1)]
    assert names[:2] == ["a", "a-2"] and len(set(names)) == 6
    names = [t.name for t in load_stream(path, split_by="class", classes_per_task=3)]
    assert names == ["a-a-a_label_with_a_long_name_0", "a_label_with_a_long_name_1-and-2-more"]


def test_refused(reviews: Path, write_task: WriteTask, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs classes_per_task"):
        load_stream(reviews, split_by="class")
    with pytest.raises(StreamError, match="no column `store` .* `text`, `label`, `shop`"):
        load_stream(reviews, split_by="store")
    with pytest.raises(StreamError, match="is a file: put it into a folder of task folders.*say how to divide it"):
        load_stream(reviews)
    with pytest.raises(StreamError, match="no task `zo` .*did you mean `zoo`"):
        load_stream(reviews, split_by="shop", tasks=["zo"])
    with pytest.raises(StreamError, match="the same task twice"):
        load_stream(reviews, split_by="shop", tasks=["zoo", "Zoo"])
    with pytest.raises(StreamError, match="folder of tasks already: leave split_by out"):
        load_stream(write_task("a", ["x"]).parent, split_by="class", classes_per_task=1)
    (tmp_path / "table.xlsx").write_text("")
    with pytest.raises(StreamError, match="known formats are .jsonl"):
        load_stream(tmp_path / "table.xlsx", split_by="class", classes_per_task=1)


def test_what_only_the_test_data_has(write_task: WriteTask) -> None:
    folder = write_task("a", ["x", "y"])
    with (folder / "test.jsonl").open("a") as file:
        file.write('{"text": "t", "label": "zebra"}\n')
    with pytest.raises(StreamError, match="the test split of `a` has labels .*`zebra`"):
        load_stream(folder, split_by="class", classes_per_task=1)
    for split, shops in (("train", ["p"]), ("test", ["p", "q"])):
        rows = [{"text": f"{i}", "label": i % 2, "shop": shop} for i in range(8) for shop in shops]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(StreamError, match="`shop` is `q` in the test split of `a` but nowhere in its train split"):
        load_stream(folder, split_by="shop")


def test_a_dataset_without_training_data(write_task: WriteTask) -> None:
    folder = write_task("a", ["x", "y"])
    (folder / "train.jsonl").unlink()
    with pytest.raises(StreamError, match="`a` has no train split; its splits are: test"):
        load_stream(folder, split_by="class", classes_per_task=1)


def test_too_few_rows_for_a_test_split(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("text,label\none,x\ntwo,y\n")
    with pytest.raises(StreamError, match="the test split of task `x` is empty"):
        load_stream(path, split_by="class", classes_per_task=1)
