"""Streams whose classes are numbered otherwise, and streams that a run wrote down."""

from __future__ import annotations

from dataclasses import replace

import pytest

from perpetune.core.errors import ConfigError
from perpetune.streams import fingerprint, load_again, load_stream


def labelled(stream):
    """What each row of each task says, by its texts alone."""
    return [
        [(row["text"], stream.labels[row["label"]]) for row in getattr(task, split)]
        for task in stream
        for split in ("train", "test", "validation")
        if getattr(task, split) is not None
    ]


def test_a_stream_is_numbered_as_it_was_when_it_had_more_tasks(three_tasks):
    """The data of the tasks that are left is then what it was, by its fingerprint."""
    settings = {"scenario": "class", "train_limit": 6, "validation_share": 0.1}
    whole = load_stream(three_tasks, **settings)
    fewer = load_stream(three_tasks, tasks=["stones", "zoo"], **settings)
    assert fingerprint(fewer.tasks[0]) != fingerprint(whole.tasks[2])
    found = fewer.numbered(whole.labels)
    assert found.labels == whole.labels and labelled(found) == labelled(fewer)
    assert [fingerprint(t) for t in found] == [fingerprint(whole.tasks[i]) for i in (2, 0)]
    assert [t.classes for t in found] == [whole.tasks[i].classes for i in (2, 0)]
    assert found.tasks[0].train.features == fewer.tasks[0].train.features
    assert set(found.tasks[0].train["label"]) == set(found.tasks[0].classes)
    more = fewer.numbered(("moss", "granite"))
    assert more.labels[:2] == ("moss", "granite") and set(more.labels) == {"moss", *fewer.labels}
    assert labelled(more) == labelled(fewer)


def test_images_are_not_touched():
    stream = load_stream("digits", train_limit=20, test_limit=20)
    found = stream.select([stream.tasks[1].name]).numbered(stream.labels[::-1])
    a, b = (s.tasks[k].test for s, k in ((stream, 1), (found, 0)))
    assert a["image"][0].tobytes() == b["image"][0].tobytes()
    assert [9 - c for c in a["label"]] == b["label"][:]


def test_a_stream_that_was_written_down_is_loaded_again(three_tasks):
    whole = load_stream(three_tasks, scenario="class", validation_share=0.1).on_validation()
    written = {key: getattr(whole, key) for key in ("name", "scenario", "inputs", "labels", "source")}
    found = load_again(written, ["stones", "zoo"])
    assert (found.name, found.labels) == (whole.name, whole.labels)
    assert [fingerprint(t) for t in found] == [fingerprint(whole.tasks[i]) for i in (2, 0)]
    moved = three_tasks.rename(three_tasks.parent / "moved")
    assert fingerprint(load_again(written, ["zoo"], str(moved)).tasks[0]) == fingerprint(whole.tasks[0])
    assert load_again(written, []).tasks == ()
    with pytest.raises(ConfigError, match="does not say where the stream"):
        load_again({**written, "source": {}}, ["zoo"])
    assert replace(whole, tasks=()).numbered(whole.labels).labels == whole.labels
