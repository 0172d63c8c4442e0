"""The shared streams, as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from perpetune.streams import fingerprint, load_stream

FIVE = ["agnews", "amazon", "dbpedia", "SST-2", "yelp"]


@pytest.mark.real
def test_five_text_tasks(streams_dir: Path) -> None:
    stream = load_stream(streams_dir / "cl-benchmark", tasks=FIVE, train_limit=1000, test_limit=500)
    assert [t.name for t in stream] == ["agnews", "amazon", "dbpedia", "sst2", "yelp"]
    assert stream.scenario == "class" and len(stream.labels) == 4 + 5 + 14 + 2
    assert stream.tasks[1].classes == stream.tasks[4].classes == (4, 5, 6, 7, 8)
    assert [(len(t.train), len(t.test)) for t in stream] == [(1000, 500)] * 5
    assert stream.labels[:4] == ("World", "Sports", "Business", "Science or Technology")
    again = load_stream(**stream.source)
    assert [fingerprint(t) for t in again] == [fingerprint(t) for t in stream]
    sentiment = load_stream(
        streams_dir / "cl-benchmark", tasks=["amazon", "yelp"], scenario="domain", train_limit=50, test_limit=50
    )
    assert sentiment.scenario == "domain"


@pytest.mark.real
def test_omniglot(streams_dir: Path) -> None:
    stream = load_stream(streams_dir / "omniglot", train_limit=50, test_limit=50)
    assert len(stream) == 8 and stream.modality == "image" and "japanese_katakana" in [t.name for t in stream]
    first = stream.tasks[0]
    assert stream.label_texts(first.classes)[:2] == ["balinese/character01", "balinese/character02"]
    assert first.train[0]["image"].size == (105, 105)
    assert len(set(first.train["id"])) == 50
