"""Columns and labels: what is understood, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value

from perpetune.core.errors import StreamError
from perpetune.streams.rows import in_order, open_rows


def opened(columns: dict[str, str] | None = None, **values: list) -> object:
    return open_rows(Dataset.from_dict(values), "the train split", columns)


def test_finished_rows_hold_ids_global_labels_and_inputs_of_the_picked_rows_alone() -> None:
    rows = open_rows(Dataset.from_dict({"text": list("abcd"), "label": list("xyxy"), "more": [1, 2, 3, 4]}), "here")
    picked = rows.pick(np.array([0, 3]))
    data = picked.finish({"y": 5, "x": 7})
    assert data.column_names == ["id", "label", "text"]
    assert (data["text"][:], data["label"][:]) == (["a", "d"], [7, 5])
    assert data["id"][:] == [rows.finish({"y": 5, "x": 7})["id"][i] for i in (0, 3)]


def test_columns_may_trade_names() -> None:
    data = Dataset.from_dict({"text": ["a"], "text_pair": ["b"], "label": ["x"]})
    rows = open_rows(data, "here", {"text": "text_pair", "text_pair": "text"})
    assert rows.data[0] == {"text": "b", "text_pair": "a"}


def test_labels_are_text_whatever_they_are_in_the_file() -> None:
    for values, texts in (([1, 0], ["1", "0"]), ([True, False], ["True", "False"]), (["b", "a"], ["b", "a"])):
        assert list(opened(text=["p", "q"], label=values).labels) == texts
    features = Features(text=Value("string"), label=ClassLabel(names=["no", "yes"]))
    rows = open_rows(Dataset.from_dict({"text": ["p", "q"], "label": [1, 0]}, features=features), "here")
    assert list(rows.labels) == ["yes", "no"] and rows.order == ("no", "yes")


def test_order_of_labels() -> None:
    labels = np.array(["10", "9", "b", "a"], dtype=object)
    assert in_order(labels) == ["9", "10", "a", "b"]
    assert in_order(labels, ("a",), ("b", "a", "c", "10", "9")) == ["b", "a", "10", "9"]


def test_images_in_plain_bytes_are_images() -> None:
    pgm = b"P5\n2 2\n255\n" + bytes([0, 85, 170, 255])
    for value in (pgm, {"bytes": pgm, "path": None}):
        rows = opened(image=[value], label=["x"])
        assert isinstance(rows.data.features["image"], Image)
        assert np.asarray(rows.data[0]["image"]).tolist() == [[0, 85], [170, 255]]


def test_a_missing_column_names_those_found() -> None:
    with pytest.raises(StreamError, match=r'no column `text` or `image` .* `sentence`, `label`.*"sentence": "text"'):
        opened(sentence=["a"], label=["x"])
    with pytest.raises(StreamError, match=r'no column `label` in .* `text`, `gold`.*"gold": "label"'):
        opened(text=["a"], gold=["x"])
    with pytest.raises(StreamError, match="no column `text`"):
        opened({"sentance": "text"}, sentence=["a"], label=["x"])
    with pytest.raises(StreamError, match="no column `text`"):
        opened(text_pair=["a"], label=["x"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text": ["a", None, None], "label": ["x"] * 3}, "2 of 3 texts in column `text` .* null, the first in row 1"),
        ({"text": ["a", "b"], "text_pair": [None, "c"], "label": ["x", "y"]}, "texts in column `text_pair`"),
        ({"text": [1, 2], "label": ["x", "y"]}, "`text` of the train split holds int64, not text"),
        ({"image": ["a.png"], "label": ["x"]}, "`image` of the train split holds string, not images"),
        ({"text": ["a", "b"], "label": ["x", None]}, "1 of 2 rows .* no label, the first is row 1"),
        ({"text": ["a", "b"], "label": [1.0, float("nan")]}, "1 of 2 rows .* no label"),
        ({"text": ["a"], "label": [["x", "y"]]}, "not one label a row"),
        ({"text": ["a"], "image": ["a"], "label": ["x"]}, "has both `image` and `text`"),
        ({"text": [], "label": []}, "the train split is empty"),
    ],
)
def test_refused(values: dict[str, list], message: str) -> None:
    with pytest.raises(StreamError, match=message):
        opened(**values)


def test_the_hubs_sign_for_no_label() -> None:
    features = Features(text=Value("string"), label=ClassLabel(names=["no", "yes"]))
    data = Dataset.from_dict({"text": ["p", "q"], "label": [-1, 0]}, features=features)
    with pytest.raises(StreamError, match="1 of 2 rows of the test split have no label"):
        open_rows(data, "the test split")


def test_csv_keeps_words_that_look_like_nothing_and_refuses_empty_cells(tmp_path: Path) -> None:
    from perpetune.streams.formats import read_files

    path = tmp_path / "train.csv"
    path.write_text('text,label\nNA,None\n"null",1.50\n')
    rows = open_rows(read_files([path], "here"), "here")
    assert rows.data["text"][:] == ["NA", "null"] and list(rows.labels) == ["None", "1.50"]
    path.write_text("text,label\n,x\n")
    with pytest.raises(StreamError, match="texts in column `text` of here are null"):
        open_rows(read_files([path], "here"), "here")
