"""A label has one text, whatever the file type; what is not certain is warned of, what is no class is refused."""

from __future__ import annotations

import json
import unicodedata
import warnings
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perpetune.core.errors import StreamError
from perpetune.streams import Stream, fingerprint, load_stream
from perpetune.streams.labels import key, label_text, loose_key, one_text


def write(folder: Path, task: str, labels: list[object], kind: str = "jsonl") -> Path:
    path = folder / "s" / task
    path.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        rows = [{"text": f"{task} {split} {i}", "label": label} for i, label in enumerate(labels)]
        if kind == "jsonl":
            text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
            (path / f"{split}.jsonl").write_text(text, encoding="utf-8")
        elif kind == "csv":
            pd.DataFrame(rows).to_csv(path / f"{split}.csv", index=False)
        else:
            pd.DataFrame(rows).to_parquet(path / f"{split}.parquet")
    return path.parent


def texts(stream: Stream) -> list[list[str]]:
    return [stream.label_texts(task.train["label"][:]) for task in stream]


@pytest.mark.parametrize("first", [[1, 2], ["1", "2"]])
@pytest.mark.parametrize("second", [[1, "2"], [1.0, 2.0], ["1.0", "2.0"]])
@pytest.mark.parametrize("kinds", [("jsonl", "parquet"), ("parquet", "csv"), ("csv", "jsonl")])
def test_whole_numbers_are_one_class(tmp_path: Path, first: list, second: list, kinds: tuple[str, str]) -> None:
    if kinds[1] == "parquet" and second == [1, "2"]:
        second = ["1", "2"]  # a column of Parquet has one type
    write(tmp_path, "w1", first, kinds[0])
    stream = load_stream(write(tmp_path, "w2", second, kinds[1]))
    assert stream.labels == ("1", "2") and stream.scenario == "domain" and texts(stream) == [["1", "2"]] * 2


@pytest.mark.parametrize("second", [[True, False], ["True", "False"], ["true", "false"], ["TRUE", "FALSE"]])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_truth_values_are_one_class_under_the_text_that_came_first(tmp_path: Path, second: list, kind: str) -> None:
    write(tmp_path, "w1", ["true", "false"])
    stream = load_stream(write(tmp_path, "w2", second, kind))
    assert set(stream.labels) == {"true", "false"} and texts(stream) == [["true", "false"]] * 2


def test_blanks_around_and_the_composition_of_characters_mean_nothing(tmp_path: Path) -> None:
    write(tmp_path, "w1", ["été", "late"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stream = load_stream(write(tmp_path, "w2", [unicodedata.normalize("NFD", "été"), " late\u00a0"]))
    assert stream.labels == ("late", "été") and texts(stream) == [["été", "late"]] * 2


@pytest.mark.parametrize("second", ["Late fee", "late  fee", "late\u00a0fee", "late fee\u200b", "ｌate fee", "latefee"])
def test_a_label_of_another_form_is_warned_of(tmp_path: Path, second: str) -> None:
    write(tmp_path, "w1", ["late fee", "refund"])
    with pytest.warns(UserWarning) as warned:
        stream = load_stream(write(tmp_path, "w2", ["refund", second]))
    said = str(warned[0].message)
    assert len(stream.labels) == 3 and repr(second) in said and "'late fee'" in said and "\n" not in said
    assert "w1/train.jsonl, line 1" in said and "w2/train.jsonl, line 2" in said and warned[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_stream(tmp_path / "s", relabel={second: "late fee"}).labels) == 2


def test_strings_that_look_like_numbers_keep_their_form_where_nothing_contradicts(tmp_path: Path) -> None:
    assert load_stream(write(tmp_path, "w1", ["1.0", "2.5", "2024-05-01"])).labels == ("1.0", "2.5", "2024-05-01")


def test_numbers_in_csv_with_gaps_and_versions(tmp_path: Path) -> None:
    assert load_stream(write(tmp_path, "w1", ["1.0", "10.0", "2.0"], "csv")).labels == ("1", "2", "10")
    assert load_stream(write(tmp_path / "b", "w1", ["1.0", "1.5"], "csv")).labels == ("1.0", "1.5")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("values", [[i / 7 for i in range(1, 12)], [(i % 25) / 10 for i in range(200)]])
def test_a_continuous_target_is_refused(tmp_path: Path, kind: str, values: list[float]) -> None:
    folder = write(tmp_path, "w1", values, kind)
    for options in ({}, {"split_by": "class", "classes_per_task": 2}):
        with pytest.raises(StreamError, match=r"continuous target \(\d+ numbers in \d+ rows.*cut it into ranges"):
            load_stream(folder / "w1" if options else folder, **options)


@pytest.mark.parametrize("values", [[0.5, 1.0, 1.5, 2.0] * 5, [float(i) for i in range(40)]])
def test_few_numbers_and_whole_ones_are_classes(tmp_path: Path, values: list[float]) -> None:
    for kind in ("csv", "parquet", "jsonl"):
        stream = load_stream(write(tmp_path / kind, "w1", values, kind))
        assert stream.labels == tuple(str(v) if 0.5 in values else label_text(v) for v in sorted(set(values)))


def test_answers_stay_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "s" / "w1"
    path.mkdir(parents=True)
    answers = ["1.0", "1", "true", "True", "e\u0301", "yes", "Yes"]
    for split in ("train", "test"):
        rows = [json.dumps({"prompt": f"q{i}", "response": answer}) for i, answer in enumerate(answers)]
        (path / f"{split}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(load_stream(tmp_path / "s").labels) == set(answers)


def test_task_json_and_relabel_name_a_class_in_any_form(tmp_path: Path) -> None:
    folder = write(tmp_path, "w1", [1.0, 2.0], "parquet")
    (folder / "w1" / "task.json").write_text('{"labels": [2.0, 1.0]}', encoding="utf-8")
    assert load_stream(folder).labels == ("2", "1")
    assert load_stream(folder, relabel={"1.0": "one"}).labels == ("2", "one")


def test_a_run_goes_on_under_the_texts_that_it_learned(tmp_path: Path) -> None:
    stream = load_stream(write(tmp_path, "w1", [1.0, 2.0, True, " late "], "jsonl"))
    assert stream.labels == ("1", "2", "True", "late")
    before = ("2.0", "1.0", "late", "true")  # as a run wrote them down
    now = stream.numbered(before)
    assert now.labels == before and [now.labels[y] for y in now.tasks[0].train["label"]] == [
        "1.0",
        "2.0",
        "true",
        "late",
    ]
    assert fingerprint(now.tasks[0]) != fingerprint(stream.tasks[0]) and stream.numbered(stream.labels) is not None
    with pytest.warns(UserWarning, match="'late' in stream `s` is 'Late' in the run"):
        stream.numbered(("Late",))


FORMS = st.text("aAéE\u0301 1.0\u00a0trueTRUE\ufb01", max_size=8)


@given(FORMS)
def test_keys_are_stable(text: str) -> None:
    assert key(label_text(text)) == key(text) == key(key(text)) and loose_key(key(text)) == loose_key(text)
    assert key(unicodedata.normalize("NFD", text)) == key(text) == key(f"  {text}\n")
    assert loose_key(text.swapcase()) == loose_key(text) or "\u0301" in text or "\ufb01" in text


@given(st.lists(FORMS, max_size=12))
def test_one_text_joins_what_has_one_key_and_nothing_else(labels: list[str]) -> None:
    labels = [label_text(label) for label in labels]
    new = one_text(labels)
    for a in labels:
        assert key(new.get(a, a)) == key(a)
        for b in labels:
            assert (new.get(a, a) == new.get(b, b)) == (key(a) == key(b))


@pytest.mark.filterwarnings("ignore:label")
def test_a_test_label_of_another_form_says_which_it_is_like(tmp_path: Path) -> None:
    folder = write(tmp_path, "w1", ["Late", "refund"])
    (folder / "w1" / "test.jsonl").write_text('{"text": "a", "label": "late"}', encoding="utf-8")
    with pytest.raises(StreamError, match=r"in row 0 \(.*test.jsonl, line 1\), which is `Late` there but for its form"):
        load_stream(folder)


def test_a_label_that_nobody_sees_is_none(tmp_path: Path) -> None:
    with pytest.raises(StreamError, match="1 of 2 rows .* have no label, the first is row 1"):
        load_stream(write(tmp_path, "w1", ["late", "\u200b"]))
