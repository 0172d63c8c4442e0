"""Tasks in natural order, behind those that a run knows; and tasks whose data is gone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import perpetune as pt
from perpetune.core.errors import RunError, StreamError
from perpetune.recipes.controls import tfidf_ridge
from perpetune.runs.config_file import read_config
from perpetune.runs.directory import Run
from perpetune.streams import Stream, fingerprint, load_again, load_stream
from perpetune.streams.folder import natural

WriteTask = Callable[..., Path]


def names(stream: Stream) -> list[str]:
    return [task.name for task in stream]


def learner(run: Path) -> pt.Learner:
    return pt.Learner(None, recipe=tfidf_ridge(words=16), run=run)


def learned(run: Path) -> list[str]:
    return list(pt.Result(run).tasks)


@pytest.fixture
def weeks(write_task: WriteTask) -> Path:
    for week in (8, 9):
        folder = write_task(f"week-{week}", [f"a{week}", f"b{week}"], train=3, test=2)
    return folder.parent


def test_numbers_in_names_count(write_task: WriteTask) -> None:
    for name in ("week-10", "week-2", "week-1", "2026-01", "2025-12", "Week-3", "intro"):
        folder = write_task(name, ["x", "y"], train=1, test=1).parent
    assert names(load_stream(folder)) == ["2025-12", "2026-01", "week-3", "intro", "week-1", "week-2", "week-10"]
    assert names(load_stream(folder, tasks=["week-10", "week-1"])) == ["week-10", "week-1"]


@given(st.lists(st.text("ab-_.019é ", max_size=6)))
def test_the_order_is_that_of_numbers_and_else_of_text(found: list[str]) -> None:
    plain = [name for name in found if not any(c.isdigit() for c in name)]
    assert sorted(plain, key=natural) == sorted(plain)
    assert sorted(found, key=natural) == sorted(reversed(found), key=natural)
    numbers = [f"w{n}" for n in range(12)]
    assert sorted(reversed(numbers), key=natural) == numbers


@pytest.mark.parametrize("added", ["week-10", "another", "week-1"])
def test_what_joins_a_run_comes_last_whatever_it_is_called(
    weeks: Path, write_task: WriteTask, tmp_path: Path, added: str
) -> None:
    learner(tmp_path / "run").learn(load_stream(weeks))
    write_task(added, ["new", "newer"], train=3, test=2)
    learner(tmp_path / "run").learn(load_stream(weeks))
    assert learned(tmp_path / "run") == ["week-8", "week-9", added]
    written = read_config(tmp_path / "run")["stream"]
    assert written["tasks"] == written["source"]["tasks"] == ["week-8", "week-9", added]
    assert written["labels"][:4] == ["a8", "b8", "a9", "b9"]


def test_a_run_goes_on_in_the_order_that_it_began_with(
    weeks: Path, write_task: WriteTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_task("week-10", ["a10", "b10"], train=3, test=2)
    alphabetical = ["week-10", "week-8", "week-9"]  # as runs were made before
    learner(tmp_path / "whole").learn(load_stream(weeks, tasks=alphabetical))
    half = learner(tmp_path / "half")
    commit = Run.commit

    def stopped(self: Run, task: str, files: dict, facts: dict) -> object:
        made = commit(self, task, files, facts)
        if task == "week-10":
            raise KeyboardInterrupt
        return made

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "commit", stopped)
        half.learn(load_stream(weeks, tasks=alphabetical))
    learner(tmp_path / "half").learn(load_stream(weeks))
    assert learned(tmp_path / "half") == learned(tmp_path / "whole") == alphabetical
    for commit_ in sorted((tmp_path / "whole" / "commits").iterdir()):
        for file in ("head_added.safetensors", "head_sums.safetensors", "predictions.safetensors"):
            if (commit_ / file).exists():
                assert (commit_ / file).read_bytes() == (tmp_path / "half/commits" / commit_.name / file).read_bytes()


def test_an_order_that_somebody_said_is_not_changed(weeks: Path, tmp_path: Path) -> None:
    learner(tmp_path / "run").learn(load_stream(weeks))
    for options in ({"tasks": ["week-9", "week-8"]}, {"order_seed": 1}):
        stream = load_stream(weeks, **options)
        assert names(stream.ordered_after(["week-8", "week-9"])) == names(stream)
    with pytest.raises(RunError, match="has learned week-8, week-9 in this order; the stream now starts with week-9"):
        learner(tmp_path / "run").learn(load_stream(weeks, tasks=["week-9", "week-8"]))


def test_data_of_learned_tasks_may_be_gone(weeks: Path, write_task: WriteTask) -> None:
    whole = load_stream(weeks)
    write_task("week-10", ["a10", "b10"], train=3, test=2)
    (weeks / "week-8" / "train.jsonl").unlink()
    shutil.rmtree(weeks / "week-9")
    with pytest.raises(StreamError, match="task `week-8` has no train split"):
        load_stream(weeks)
    stream = load_stream(weeks, learned=["week-8", "week-9"], validation_share=0.3, train_limit=2)
    assert names(stream) == ["week-8", "week-9", "week-10"]
    first, second, third = stream.tasks
    assert (first.gone, second.gone, third.gone) == (("train",), ("train", "test"), ())
    assert [len(t.train) for t in stream] == [0, 0, 2] and [len(t.test) for t in stream] == [4, 0, 4]
    assert first.test["id"][:] == whole.tasks[0].test["id"][:] and first.train.column_names == third.train.column_names
    assert stream.label_texts(first.classes) == ["a8", "b8"] and second.classes == ()
    assert fingerprint(third) == fingerprint(load_stream(weeks, tasks=["week-10"], validation_share=0.3, train_limit=2)
                                             .numbered(stream.labels).tasks[0])  # fmt: skip
    assert len(stream.on_validation().tasks[0].test) == 0
    assert "learned" not in stream.source
    written = {"labels": whole.labels, "name": "s", "source": whole.source, "scenario": "class", "inputs": ["text"]}
    again = load_again(written, ["week-8", "week-9"], learned=["week-8", "week-9"]) if len(third.train) else None
    assert again is not None and again.labels[:4] == whole.labels and again.tasks[0].gone == ("train",)


def test_all_data_gone_is_said(weeks: Path) -> None:
    for week in (8, 9):
        shutil.rmtree(weeks / f"week-{week}")
    with pytest.raises(StreamError, match="is gone|no task folder"):
        load_stream(weeks, learned=["week-8", "week-9"])
