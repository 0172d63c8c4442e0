"""The example that deals characters, upright and turned, to many small tasks."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

import perpetune as pt
from examples import many_characters


@pytest.fixture
def alphabets(tmp_path):
    """Two alphabets of two characters, each a bright corner of its own."""
    for alphabet, corners in {"one": [(0, 0), (0, 1)], "two": [(1, 0), (1, 1)]}.items():
        for split, count in (("train", 3), ("test", 1)):
            rows = []
            for k, (x, y) in enumerate(corners):
                pixels = np.zeros((8, 8), dtype=np.uint8)
                pixels[4 * x : 4 * x + 3, 4 * y] = 255
                rows += [{"image": Image.fromarray(pixels), "label": f"{alphabet}/{k}"}] * count
            (tmp_path / "alphabets" / alphabet).mkdir(parents=True, exist_ok=True)
            Dataset.from_list(rows).to_parquet(tmp_path / "alphabets" / alphabet / f"{split}.parquet")
    return tmp_path / "alphabets"


def test_every_character_has_one_task_and_upright_ones_come_first(alphabets, tmp_path, monkeypatch):
    given = ["--stream", alphabets, "--out", tmp_path / "many", "--tasks", 3, "--unseen", "two"]
    monkeypatch.setattr("sys.argv", ["many_characters.py", *map(str, given)])
    many_characters.main()
    stream = pt.load_stream(tmp_path / "many", scenario="class")
    assert len(stream) == 3 and len(stream.labels) == 6 and all(len(task.classes) == 2 for task in stream)
    assert set(stream.labels[:4]) == {"one/0", "one/1", "two/0", "two/1"}
    assert {label.partition(" turned by ")[2] for label in stream.labels[4:]} == {"90"}
    assert [len(task.train) for task in stream] == [6] * 3

    pictures = {}
    for task in stream:
        pictures |= {
            stream.labels[y]: np.asarray(x) for x, y in zip(task.test["image"], task.test["label"], strict=True)
        }
    for label in stream.labels[4:]:
        assert np.array_equal(pictures[label], np.rot90(pictures[label.partition(" ")[0]]))


def test_too_few_characters_are_refused(alphabets, tmp_path, monkeypatch, capsys):
    given = ["--stream", alphabets, "--out", tmp_path / "many", "--tasks", 9, "--unseen", "two"]
    monkeypatch.setattr("sys.argv", ["many_characters.py", *map(str, given)])
    with pytest.raises(SystemExit):
        many_characters.main()
    assert "8 characters are too few for 9 tasks of 2" in capsys.readouterr().err and not (tmp_path / "many").exists()
