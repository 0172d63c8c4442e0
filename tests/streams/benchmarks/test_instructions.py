"""TRACE and SuperNI, from folders of their layouts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from perpetune.core.errors import StreamError
from perpetune.streams import fingerprint, load_stream
from perpetune.streams.benchmarks.instructions import SUPERNI_ORDERS
from perpetune.streams.passage import unmark

pytestmark = pytest.mark.filterwarnings("ignore:.*published size:UserWarning")


def test_trace(trace: Path) -> None:
    stream = load_stream("trace", data=trace)
    assert [t.name for t in stream] == (
        "c-stance fomc meetingbank py150 scienceqa numglue-cm numglue-ds 20minuten".split()
    )
    assert stream.modality == "language" and stream.inputs == ("prompt",)
    first = stream.tasks[0]
    assert first.train["prompt"] == [f"C-STANCE train {i}?" for i in range(3)]
    assert first.validation is not None and first.validation["prompt"][0] == "C-STANCE eval 0?"
    assert [stream.labels[y] for y in stream.tasks[5].test["label"]] == ["0", "1"]  # numbers are answers, too
    assert [fingerprint(t) for t in load_stream(**stream.source)] == [fingerprint(t) for t in stream]
    (trace / "FOMC" / "eval.json").unlink()
    assert load_stream("trace", data=trace, tasks=["FOMC"]).tasks[0].validation is None


def test_trace_that_is_not_whole(trace: Path) -> None:
    (trace / "Py150" / "test.json").unlink()
    with pytest.raises(StreamError, match=r"benchmark `trace`: .*Py150/test.json is missing. Give the folder of TRACE"):
        load_stream("trace", data=trace)
    (trace / "FOMC" / "test.json").write_text('[{"prompt": "a", "answer": ""}]')
    with pytest.raises(StreamError, match="1 of 1 answers of the test split of task `fomc` are empty"):
        load_stream("trace", data=trace, tasks=["fomc"])
    (trace / "FOMC" / "test.json").write_text("[]")
    with pytest.raises(StreamError, match="the test split of task `fomc` is empty"):
        load_stream("trace", data=trace, tasks=["fomc"])


@pytest.mark.parametrize(("name", "order"), [("superni", 1), ("superni-order-2", 2)])
def test_superni_as_sapt_divided_it(name: str, order: int, sapt: Path) -> None:
    for folder in (sapt, sapt / "SuperNI"):
        stream = load_stream(name, data=folder)
        assert [t.name for t in stream] == list(SUPERNI_ORDERS[order]) and len(stream) == 15
    assert sorted(SUPERNI_ORDERS[1]) == sorted(SUPERNI_ORDERS[2])
    task = next(t for t in stream if t.name == "task363_sst2_polarity_classification")
    assert (len(task.train), len(task.test), task.validation) == (4, 2, None)  # one answer was empty
    text, begin, end = unmark(task.train[1]["prompt"])
    assert text == (
        f"Definition: Do what {task.name} asks.\n\nNow complete the following example -\n"
        f"Input: {task.name} train 1\nOutput:"
    )
    assert text[begin:end] == f"{task.name} train 1"
    assert stream.labels[task.train[1]["label"]] == "answer 1"  # the first of several
    assert unmark(task.test[0]["prompt"])[0].startswith("Definition: Do it.\n")


def test_superni_divided_here(natural_instructions: Path) -> None:
    stream, again = (load_stream("superni", data=natural_instructions) for _ in range(2))
    assert [t.name for t in stream] == list(SUPERNI_ORDERS[1])
    for task, same in zip(stream, again, strict=True):
        assert task.validation is not None
        parts = [set(part["id"]) for part in (task.train, task.validation, task.test)]
        assert [len(part) for part in parts] == [16, 2, 2] and len(set.union(*parts)) == 20
        assert fingerprint(task) == fingerprint(same)


def test_superni_that_is_not_whole(sapt: Path, natural_instructions: Path) -> None:
    task = "task1572_samsum_summary"
    (natural_instructions / "tasks" / f"{task}.json").unlink()
    with pytest.raises(StreamError, match=f"benchmark `superni`: .*{task}.json is missing. Give the folder CL_Bench"):
        load_stream("superni", data=natural_instructions)
    path = sapt / "SuperNI" / task / "train.json"
    path.write_text(json.dumps({"Definition": [], "Instances": []}))
    with pytest.raises(StreamError, match=f"{task}/train.json is no task of Natural Instructions"):
        load_stream("superni", data=sapt)
    path.write_text(json.dumps({"Definition": "x", "Instances": []}))
    with pytest.raises(StreamError, match=f"the train split of task `{task}` is empty"):
        load_stream("superni", data=sapt)
    with pytest.raises(StreamError, match="no copy of these tasks on the Hub"):
        load_stream("superni-order-2")
