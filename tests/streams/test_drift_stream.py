from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

import perpetune as pt
from perpetune.core.errors import ConfigError, StreamError
from perpetune.learning.config import RunConfig, load_config


@pytest.fixture(scope="module")
def stream(word_stream):
    return pt.load_stream(word_stream)


@pytest.mark.parametrize("seed", range(5))
def test_every_task_comes_and_none_twice_in_a_row(stream, seed):
    fed = pt.drift(stream, 6, (5, 8), seed=seed)
    assert len(fed.segments) == 6 and {task for _, _, task in fed.segments} == {0, 1, 2}
    assert all(a[2] != b[2] and a[1] == b[0] for a, b in pairwise(fed.segments))
    assert all(5 <= stop - start <= 8 for start, stop, _ in fed.segments)
    assert len(fed.rows) == len(fed.truth) == fed.segments[-1][1]


def test_rows_are_those_of_their_task_and_none_comes_twice(stream):
    fed = pt.drift(stream, 6, (5, 8))
    assert fed.rows.column_names == stream.tasks[0].train.column_names
    ids = np.array(fed.rows["id"])
    assert len(set(ids)) == len(ids)
    for place, task in enumerate(stream):
        assert set(ids[fed.truth == place]) <= set(task.train["id"])


def test_the_seed_decides_and_nothing_else(stream):
    ids = [pt.drift(stream, 6, (5, 8), seed=seed).rows["id"][:] for seed in (0, 0, 1)]
    assert ids[0] == ids[1] != ids[2]


def test_examples_of_a_task_are_shuffled(stream):
    fed = pt.drift(stream, 3, (20, 24))
    start, stop, _ = fed.segments[0]
    labels = fed.rows["label"][start:stop]
    assert sum(a != b for a, b in pairwise(labels)) > 5  # in the file, one class follows the other


@pytest.mark.parametrize(
    ("segments", "length", "error", "says"),
    [
        (2, (10, 16), ConfigError, "every task"),
        (4, (16, 10), ConfigError, "length"),
        (4, (0, 10), ConfigError, "length"),
        (12, (20, 24), StreamError, "fewer or shorter"),
    ],
)
def test_impossible_streams_are_refused(stream, segments, length, error, says):
    with pytest.raises(error, match=says):
        pt.drift(stream, segments, length)


def test_the_command_line_wins_setting_by_setting(word_stream, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(f"stream: {{source: {word_stream}, drift: {{segments: 5, length: [4, 6], seed: 3}}}}")
    config = load_config(path, RunConfig, {"stream": {"drift": {"told": True}}})
    how = config.stream.drift
    assert (how.segments, how.length, how.seed, how.told) == (5, (4, 6), 3, True)
    assert len(how.feed(config.stream.load()).segments) == 5
    with pytest.raises(ConfigError, match="drift"):
        load_config(path, RunConfig, {"stream": {"drift": {"windows": 3}}})
