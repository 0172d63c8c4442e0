"""Caps, validation shares, labels that contradict each other, inputs that differ, scenarios."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from perpetune.core.errors import ConfigError, StreamError
from perpetune.streams import Task, fingerprint, load_stream

WriteTask = Callable[..., Path]


def counts(task: Task, split: str) -> Counter[int]:
    return Counter(getattr(task, split)["label"])


def append(path: Path, *rows: dict[str, object]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_caps_keep_the_shares_of_the_classes(write_task: WriteTask) -> None:
    folder = write_task("a", ["x"], train=60, test=30)
    for split, n in (("train", 20), ("test", 10)):
        append(folder / f"{split}.jsonl", *({"text": f"y {i}", "label": "y"} for i in range(n)))
    task = load_stream(folder.parent, train_limit=12, test_limit=9).tasks[0]
    assert counts(task, "train") == {0: 9, 1: 3}
    assert counts(task, "test") == {0: 7, 1: 2}
    assert counts(load_stream(folder.parent, train_limit=2).tasks[0], "train") == {0: 1, 1: 1}
    assert len(load_stream(folder.parent, train_limit=500).tasks[0].train) == 80


def test_a_cap_depends_on_its_own_task_and_the_seed_alone(three_tasks: Path) -> None:
    caps = {"train_limit": 9, "test_limit": 5}
    together = {task.name: task for task in load_stream(three_tasks, **caps)}
    for task in load_stream(three_tasks, tasks=["stones", "animals"], **caps):
        assert task.train["id"][:] == together[task.name].train["id"][:]
        assert task.test["id"][:] == together[task.name].test["id"][:]
    reseeded = load_stream(three_tasks, seed=1, **caps).tasks[0]
    assert set(reseeded.train["id"]) != set(together["animals"].train["id"])
    larger = load_stream(three_tasks, train_limit=30).tasks[0]
    assert set(together["animals"].train["id"]) < set(larger.train["id"])


def test_a_cap_changes_neither_labels_nor_what_the_test_rows_are(three_tasks: Path) -> None:
    whole, capped = load_stream(three_tasks), load_stream(three_tasks, train_limit=5)
    assert whole.labels == capped.labels and [t.classes for t in whole] == [t.classes for t in capped]
    assert [t.test["id"][:] for t in whole] == [t.test["id"][:] for t in capped]


def test_a_cap_below_the_number_of_classes(three_tasks: Path) -> None:
    with pytest.raises(StreamError, match="train_limit 2 is below the 3 classes of task `animals`"):
        load_stream(three_tasks, train_limit=2)


def test_a_validation_share_comes_out_of_the_training_data_alone(three_tasks: Path) -> None:
    whole = load_stream(three_tasks)
    for task, before in zip(load_stream(three_tasks, validation_share=0.25), whole, strict=True):
        assert task.validation is not None
        train, validation = set(task.train["id"]), set(task.validation["id"])
        assert not train & validation and train | validation == set(before.train["id"])
        assert task.test["id"][:] == before.test["id"][:]
        assert set(counts(task, "validation").values()) == {5}
    capped = load_stream(three_tasks, validation_share=0.25, train_limit=6).tasks[0]
    assert len(capped.train) == 6 and len(capped.validation) == 15
    assert set(capped.validation["id"]) == set(
        load_stream(three_tasks, validation_share=0.25).tasks[0].validation["id"]
    )


def test_a_rare_class_stays_in_the_training_data(write_task: WriteTask) -> None:
    folder = write_task("a", ["x"], train=20)
    append(folder / "train.jsonl", {"text": "alone", "label": "y"})
    task = load_stream(folder.parent, validation_share=0.9).tasks[0]
    assert counts(task, "train")[1] == 1
    with pytest.raises(StreamError, match="leaves validation empty"):
        load_stream(folder.parent, validation_share=0.01)


def test_validation_data_of_the_source_is_kept(three_tasks: Path) -> None:
    for name in ("animals", "plants", "stones"):
        (three_tasks / name / "validation.jsonl").write_text((three_tasks / name / "test.jsonl").read_text())
    stream = load_stream(three_tasks, validation_share=0.5, test_limit=3)
    for task in stream:
        assert task.validation is not None and len(task.validation) == 3
    assert len(stream.tasks[0].train) == 60


def test_a_label_only_in_the_test_data(write_task: WriteTask) -> None:
    folder = write_task("a", ["x", "y"])
    append(folder / "test.jsonl", {"text": "strange", "label": "zebra"})
    with pytest.raises(StreamError, match=r"the test split of task `a` has labels .*\(`zebra`\)"):
        load_stream(folder.parent)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_label_that_task_json_lacks(write_task: WriteTask, split: str) -> None:
    folder = write_task("a", ["x", "y"], card={"labels": ["y", "x"]})
    append(folder / f"{split}.jsonl", {"text": "strange", "label": "zebra"})
    with pytest.raises(StreamError, match=f"label `zebra` in the {split} split of task `a` is not among .*: y, x"):
        load_stream(folder.parent)


def test_tasks_with_different_inputs(three_tasks: Path) -> None:
    for split in ("train", "test"):
        path = three_tasks / "stones" / f"{split}.jsonl"
        path.unlink()
        append(path, *({"text": "a", "text_pair": str(i), "label": "granite"} for i in range(4)))
    with pytest.raises(
        StreamError, match="train split of task `stones` has text and text_pair, but .* has text, .*: write them alike"
    ):
        load_stream(three_tasks)


def test_duplicates_share_an_id_across_tasks_and_labels(write_task: WriteTask) -> None:
    one, two = write_task("a", ["x", "y"]), write_task("b", ["x", "z"])
    append(one / "train.jsonl", {"text": "the same", "label": "y"}, {"text": "the same", "label": "x"})
    append(two / "test.jsonl", {"text": "the same", "label": "z"})
    first, second = load_stream(one.parent)
    assert first.train["id"][-1] == first.train["id"][-2] == second.test["id"][-1]
    assert len(set(first.train["id"])) == len(first.train) - 1


def test_a_label_text_is_one_class_wherever_it_appears(write_task: WriteTask) -> None:
    write_task("a", ["x", "y"])
    stream = load_stream(write_task("b", ["z", "y"]).parent)
    assert stream.labels == ("x", "y", "z") and [t.classes for t in stream] == [(0, 1), (1, 2)]


def test_the_scenario_follows_from_the_labels(write_task: WriteTask) -> None:
    root = write_task("a", ["x", "y"]).parent
    assert load_stream(root).scenario == "class"  # one task says nothing about domains
    write_task("b", ["y", "x"], card={"labels": ["y", "x"]})
    stream = load_stream(root)
    assert stream.scenario == "domain" and [t.classes for t in stream] == [(0, 1), (1, 0)]
    assert load_stream(root, scenario="class").scenario == "class"
    assert load_stream(root, scenario="task").scenario == "task"
    write_task("c", ["x", "z"])
    assert load_stream(root).scenario == "class"
    with pytest.raises(
        StreamError, match="not domain-incremental: only one of the tasks `a` and `c` has the label `z`"
    ):
        load_stream(root, scenario="domain")
    write_task("d", ["y"])
    assert load_stream(root, scenario="domain", tasks=["a", "d"]).scenario == "domain"  # a domain may lack a class
    with pytest.raises(ConfigError, match="no scenario `classes`: did you mean `class`"):
        load_stream(root, scenario="classes")


def test_unused_labels_of_task_json_are_no_classes(write_task: WriteTask) -> None:
    folder = write_task("a", ["x", "y"], card={"labels": ["z", "y", "x"]})
    assert load_stream(folder.parent).labels == ("y", "x")


def test_rows_keep_the_order_of_the_file(three_tasks: Path) -> None:
    for limit in (None, 30):
        texts = load_stream(three_tasks, train_limit=limit).tasks[0].train["text"][:]
        numbers = [int(text.split()[-1]) for text in texts]
        assert numbers == sorted(numbers)


def test_the_order_of_rows_does_not_change_the_labels(write_task: WriteTask) -> None:
    folder = write_task("a", ["x", "y"])
    before = load_stream(folder.parent)
    lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(reversed(lines)))
    after = load_stream(folder.parent)
    assert after.labels == before.labels and fingerprint(after.tasks[0]) != fingerprint(before.tasks[0])


@pytest.mark.parametrize(
    "option",
    [
        {"train_limit": 0},
        {"test_limit": 2.5},
        {"test_share": 1.0},
        {"validation_share": -0.1},
        {"validation_share": 1},
        {"classes_per_task": 0},
    ],
)
def test_impossible_options(three_tasks: Path, option: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(option))):
        load_stream(three_tasks, **option)
