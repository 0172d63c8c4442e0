"""Tasks that say the same in other words, with one label space."""

from __future__ import annotations

from pathlib import Path

import pytest

from perpetune.core.errors import StreamError
from perpetune.learning.config import StreamConfig
from perpetune.streams import fingerprint, load_stream

NEW: dict[str, str | None] = {"good": "positive", "very good": "positive", "bad": "negative", "so so": None}


@pytest.fixture
def reviews(write_task) -> Path:
    write_task("films", ["good", "bad"], card={"labels": ["good", "bad"]})
    return write_task("books", ["very good", "so so", "bad", "negative"]).parent


def test_labels_are_renamed_joined_and_left_out(reviews: Path) -> None:
    plain, stream = load_stream(reviews), load_stream(reviews, relabel=NEW)
    assert plain.scenario == "class" and stream.scenario == "domain"
    assert set(stream.labels) == {"positive", "negative"}
    books = {task.name: task for task in stream.tasks}["books"]
    old = {x["id"]: plain.labels[x["label"]] for task in plain for x in task.train}
    assert {old[x["id"]] for x in books.train} == {"very good", "bad", "negative"}
    assert all(stream.labels[x["label"]] == NEW.get(old[x["id"]], old[x["id"]]) for x in books.train)
    assert len(books.train) == 60 and len(books.test) == 24


def test_the_order_of_a_card_is_kept(reviews: Path) -> None:
    stream = load_stream(reviews, tasks=["films"], relabel={"good": "positive", "bad": "negative"})
    assert stream.labels == ("positive", "negative")


def test_it_is_part_of_what_loads_the_stream_again(reviews: Path) -> None:
    stream = StreamConfig(source=str(reviews), relabel=NEW, train_limit=10).load()
    again = load_stream(**stream.source)
    assert [fingerprint(t) for t in again] == [fingerprint(t) for t in stream] and again.labels == stream.labels


def test_a_label_that_no_task_has_is_refused(reviews: Path) -> None:
    with pytest.raises(StreamError, match="`god`.*good"):
        load_stream(reviews, relabel={"god": "positive"})


def test_a_task_that_is_left_without_rows_is_refused(reviews: Path) -> None:
    with pytest.raises(StreamError, match="empty"):
        load_stream(reviews, tasks=["films"], relabel={"good": None, "bad": None})
