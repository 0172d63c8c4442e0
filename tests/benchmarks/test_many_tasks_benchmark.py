"""The figures of the benchmark of many tasks, without the runs."""

from __future__ import annotations

import pytest

import perpetune as pt
from benchmarks import many_tasks


def test_the_first_tasks_are_compared_with_the_last(capsys):
    tasks = 30
    record = {
        "recipe": "lora",
        "tasks": tasks,
        "task_seconds": [1.0] * 15 + [2.0] * 12,
        "calls": [1000, 1500, 1100],
        "held_bytes": [10**6 * (1 + t) for t in range(tasks)],
        "disk_bytes": [1000] * 15 + [1500] * 15,
        "opening_seconds": {"10": 0.1, "30": 0.3},
    }
    found = many_tasks.compared(record)
    assert [round(b / a, 2) for a, b in found.values()] == [2.0, 1.1, 3.0, 1.5, 3.0]
    many_tasks.show(record, header=True)
    assert "| `lora` | 1e+03 / 2e+03 / **2.00** | 1 / 1.1 / **1.10** |" in capsys.readouterr().out


def test_its_stream_is_one_of_small_tasks(tmp_path):
    stream = pt.load_stream(many_tasks.make_stream(tmp_path, 12), scenario="class")
    assert len(stream) == 12 and {(len(t.train), len(t.test), len(t.classes)) for t in stream} == {(24, 6, 2)}


def test_too_few_tasks_are_refused(capsys):
    with pytest.raises(SystemExit):
        many_tasks.main(["--tasks", "19"])
    assert "--tasks must be 20 or more" in capsys.readouterr().err
