"""The examples that a report shows because they were right once and are wrong at the end."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from PIL import Image

from perpetune.report.collect import _flips
from perpetune.streams import fingerprint, load_stream


def test_photographs_in_cmyk_and_answers_that_are_no_label(tmp_path):
    for split in ("train", "test"):
        for shade, label in enumerate(("ant", "bee", "cat")):
            folder = tmp_path / "a" / split / label
            folder.mkdir(parents=True)
            Image.new("CMYK", (8, 8), (shade * 60, 0, 0, 0)).save(folder / "0.jpg")
    stream = load_stream(tmp_path)
    right = np.array(stream.tasks[0].test["label"][:])
    result = SimpleNamespace(
        readings=[("linear", "class")],
        config={"stream": {"name": "s", "labels": list(stream.labels), "source": stream.source}},
        tasks=["a"],
        active=[SimpleNamespace(manifest={"data": {"a": fingerprint(stream.tasks[0])}})],
        predictions=lambda head, scenario: ([{"a": right}, {"a": np.array([right[0], -1, right[1]])}], {"a": right}),
    )
    first, second = _flips(result)
    names = [stream.labels[y] for y in right]
    assert (first["was"], first["now"]) == (names[1], "none of the labels")
    assert (second["was"], second["now"]) == (names[2], names[1])
    assert first["image"].startswith("data:image/png;base64,")
