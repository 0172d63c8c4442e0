"""The six orders of the text benchmark, from a folder of its layout."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from perpetune.core.errors import ConfigError, StreamError
from perpetune.streams import fingerprint, load_again, load_stream
from perpetune.streams.passage import unmark

pytestmark = pytest.mark.filterwarnings("ignore:.*published size:UserWarning")

ORDERS = {
    1: "dbpedia amazon yahoo agnews",
    2: "dbpedia amazon agnews yahoo",
    3: "yahoo amazon agnews dbpedia",
    4: "mnli cb wic copa qqp boolqa rte imdb yelp amazon sst-2 dbpedia agnews multirc yahoo",
    5: "multirc boolqa wic mnli cb copa qqp rte imdb sst-2 dbpedia agnews yelp amazon yahoo",
    6: "yelp amazon mnli cb copa qqp rte imdb sst-2 dbpedia agnews yahoo multirc boolqa wic",
}


def rewrite(path: Path, change) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


@pytest.mark.parametrize("number", ORDERS)
def test_the_published_orders_posed_and_not(number: int, cl_benchmark: Path) -> None:
    stream = load_stream(f"cl-order-{number}", data=cl_benchmark)
    assert [t.name for t in stream] == ORDERS[number].split()
    assert stream.name == f"cl-order-{number}" and stream.inputs == ("text",) and stream.scenario == "class"
    posed = load_stream(f"cl-order-{number}", data=cl_benchmark, pose="published")
    assert posed.inputs == ("prompt",) and [t.classes for t in posed] == [t.classes for t in stream]
    for task in posed:
        lines = unmark(task.test[0]["prompt"])[0].split("\n")
        assert lines[0].startswith("Task:") and lines[1].lower() == f"dataset:{task.name}"
        assert f"Option: {', '.join(posed.label_texts(task.classes))} " in lines and lines[-1] == "Answer:"


def test_a_prompt_as_published(cl_benchmark: Path) -> None:
    stream = load_stream("cl-order-6", data=cl_benchmark, pose="published", tasks=["SST-2", "copa"])
    assert [unmark(task.test[0]["prompt"])[0] for task in stream] == [
        "Task:SC\nDataset:SST-2\nWhich of the options describes the sentiment of this text?\nOption: Good, Bad \n"
        "Text: SC/SST-2 test Good 0\n\nAnswer:",
        "Task:COPA\nDataset:COPA\nOption: A, B \nText: COPA/COPA test A 0\n\nAnswer:",
    ]


def test_the_published_wording_wins_where_it_lies_beside_the_data(cl_benchmark: Path) -> None:
    config = cl_benchmark.parent / "configs" / "instruction_config.json"
    config.parent.mkdir()
    config.write_text('{"SC": [{"instruction_type": "zero-shot", "instruction": "Which mood?\\n"}], "TC": []}')
    stream = load_stream("cl-order-1", data=cl_benchmark)
    assert [t.instruction for t in stream] == [None, "Which mood?", None, None]
    config.write_text('{"SC": "Which mood?"}')
    with pytest.raises(StreamError, match="instruction_config.json must map kinds of tasks to lists"):
        load_stream("cl-order-1", data=cl_benchmark)


def test_labels_in_prompt_order_and_no_validation_data(cl_benchmark: Path) -> None:
    stream = load_stream("cl-order-4", data=cl_benchmark)
    by_name = {t.name: t for t in stream}
    assert stream.label_texts(by_name["mnli"].classes) == ["neutral", "entailment", "contradiction"]
    assert stream.label_texts(by_name["cb"].classes) == ["entailment", "contradiction", "neutral"]
    assert by_name["amazon"].classes == by_name["yelp"].classes  # a class is its label text
    assert all(t.validation is None for t in stream)  # dev.json is test.json
    (cl_benchmark / "SC" / "yelp" / "dev.json").unlink()
    load_stream("cl-order-4", data=cl_benchmark, tasks=["yelp"])
    held = load_stream("cl-order-1", data=cl_benchmark, validation_share=0.5, tasks=["agnews"]).tasks[0]
    assert held.validation is not None and set(held.validation["id"]).isdisjoint(held.test["id"])


def test_rows_that_nobody_agreed_on_are_left_out(cl_benchmark: Path) -> None:
    (mnli,) = load_stream("cl-order-4", data=cl_benchmark, tasks=["mnli"])
    assert len(mnli.test) == 3 and "nobody agreed" not in mnli.test["text"]
    rewrite(cl_benchmark / "NLI/CB/test.json", lambda rows: [*rows, {"label": "-", "sentence": "x"}])
    with pytest.raises(StreamError, match=r"label `-` in .*CB/test.json is not in labels.json"):
        load_stream("cl-order-4", data=cl_benchmark, tasks=["cb"])


def test_other_sizes_are_said_once(cl_benchmark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(
        UserWarning, match=r"`cl-order-1` is not of its published size.*dbpedia 8/4 of 14000/7600, ama"
    ) as w:
        load_stream("cl-order-1", data=cl_benchmark)
    assert len(w) == 1 and w[0].filename == __file__
    from perpetune.streams.benchmarks import BENCHMARKS

    monkeypatch.setitem(BENCHMARKS["cl-order-1"].sizes, "agnews", (8, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_stream("cl-order-1", data=cl_benchmark, tasks=["agnews"])


def test_a_copy_without_its_large_files(cl_benchmark: Path) -> None:
    for file in ("train.json", "test.json"):
        (cl_benchmark / "TC" / "yahoo" / file).unlink()
    with pytest.raises(StreamError, match=r"yahoo/train.json, .*yahoo/test.json are missing. Give the folder CL_Bench"):
        load_stream("cl-order-1", data=cl_benchmark)
    assert len(load_stream("cl-order-1", data=cl_benchmark, tasks=["agnews", "dbpedia"])) == 2
    (cl_benchmark / "TC/agnews/train.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(StreamError, match="pointer of Git LFS"):
        load_stream("cl-order-1", data=cl_benchmark, tasks=["agnews"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"label": "World", "sentence"', "truncated or malformed"),
        ('{"label": "World"}', "must hold one JSON list of objects with sentence and label"),
        ('[{"label": "World"}]', "row 0 .* is no object with sentence and label"),
        ("[]", "the train split of task `agnews` is empty"),
    ],
)
def test_malformed_files(content: str, message: str, cl_benchmark: Path) -> None:
    (cl_benchmark / "TC/agnews/train.json").write_text(content)
    with pytest.raises(StreamError, match=message):
        load_stream("cl-order-1", data=cl_benchmark, tasks=["agnews"])


def test_what_a_benchmark_refuses(cl_benchmark: Path) -> None:
    with pytest.raises(StreamError, match=r"benchmark `cl-order-1`: there is no folder .*nowhere. Give the folder CL_"):
        load_stream("cl-order-1", data=cl_benchmark / "nowhere")
    with pytest.raises(ConfigError, match="whole datasets: leave classes_per_task out"):
        load_stream("cl-order-1", data=cl_benchmark, classes_per_task=2)
    with pytest.raises(ConfigError, match="tasks of the benchmark `cl-order-1` are fixed: leave split_by out"):
        load_stream("cl-order-1", data=cl_benchmark, split_by="class")
    with pytest.raises(ConfigError, match="leave columns and test_share out"):
        load_stream("imagenet-r", data=cl_benchmark, columns={"picture": "image"}, test_share=0.5)
    with pytest.raises(ConfigError, match="`data` is for a published benchmark, and `digits` is none"):
        load_stream("digits", data=cl_benchmark)
    with pytest.raises(StreamError, match="nor a benchmark: did you mean `cl-order-6`"):
        load_stream("cl-order-7")
    with pytest.raises(StreamError, match="no task `yelp` in `cl-order-1`"):
        load_stream("cl-order-1", data=cl_benchmark, tasks=["yelp"])


def test_the_same_stream_again_from_what_was_recorded(
    cl_benchmark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stream = load_stream("cl-order-2", data="CL_Benchmark", pose="published", train_limit=5, order_seed=1)
    assert stream.source["data"] == str(cl_benchmark) and stream.source["source"] == "cl-order-2"
    monkeypatch.chdir("/")
    again = load_stream(**stream.source)
    assert [t.name for t in again] == [t.name for t in stream] != ORDERS[2].split()
    assert [fingerprint(t) for t in again] == [fingerprint(t) for t in stream]
    moved = cl_benchmark.rename(tmp_path / "moved")
    written = {"source": stream.source, "labels": stream.labels, "name": stream.name}
    found = load_again(written, ["amazon"], str(moved))
    assert found.source["data"] == str(moved) and found.labels[: len(stream.labels)] == stream.labels


def test_a_folder_of_that_name_is_written_with_a_dot(three_tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    three_tasks.rename(three_tasks.parent / "trace")
    monkeypatch.chdir(three_tasks.parent)
    assert len(load_stream("./trace")) == 3
    with pytest.raises(StreamError, match="no copy of TRACE on the Hub"):
        load_stream("trace")
