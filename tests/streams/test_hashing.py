from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Image

from perpetune.core.errors import StreamError
from perpetune.streams import fingerprint, load_stream
from perpetune.streams.hashing import file_digest, sample_ids


def ids(**columns: list[str]) -> list[str]:
    data = Dataset.from_dict(columns)
    return sample_ids(data, np.arange(len(data)), "here")


def test_an_id_is_sha1_of_length_and_text() -> None:
    text = "Zürich"
    expected = hashlib.sha1(len(text.encode()).to_bytes(8, "little") + text.encode()).hexdigest()
    assert ids(text=[text]) == [expected]


def test_ids_tell_pairs_apart_and_know_duplicates() -> None:
    first, second, again = ids(text=["ab", "a", "ab"], text_pair=["c", "bc", "c"])
    assert first == again != second


def test_an_image_that_is_none_is_named() -> None:
    data = Dataset.from_dict({"image": [{"bytes": b"not an image", "path": None}]}, features=Features(image=Image()))
    with pytest.raises(StreamError, match="row 0 of the train split holds no readable image"):
        sample_ids(data, np.arange(1), "the train split")
    data = Dataset.from_dict({"image": [None]}, features=Features(image=Image()))
    with pytest.raises(StreamError, match="row 0 of the train split has no image"):
        sample_ids(data, np.arange(1), "the train split")


def test_a_fingerprint_sees_labels_order_and_splits() -> None:
    task = load_stream("digits", tasks=["0-1"]).tasks[0]
    original = fingerprint(task)
    backwards = task.train.select(range(len(task.train))[::-1])
    relabelled = task.train.remove_columns("label").add_column("label", [1 - y for y in task.train["label"]])
    changed = [
        replace(task, train=backwards),
        replace(task, train=relabelled),
        replace(task, test=task.train),
        replace(task, validation=task.test),
    ]
    assert len({original, *map(fingerprint, changed)}) == 5


def test_a_file_digest_sees_where_files_end(tmp_path: Path) -> None:
    a, b, c = (tmp_path / name for name in "abc")
    a.write_text("12")
    b.write_text("3")
    c.write_text("1")
    (tmp_path / "d").write_text("23")
    assert file_digest([a, b]) != file_digest([c, tmp_path / "d"])
