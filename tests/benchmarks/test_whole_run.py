"""The figures of the whole-run benchmark, without the runs."""

from __future__ import annotations

import argparse
import json

import pytest

import perpetune as pt
from benchmarks import whole_run
from benchmarks.plain_peft import read_stream


def side(wall, train, *losses):
    return {"wall": wall, "cpu": 2 * wall, "train": train, "train_cpu": 2 * train, "steps": 10, "losses": list(losses)}


def test_ratios_are_those_of_each_round():
    pairs = [
        {"perpetune": side(21, 11, 1.0, 0.5), "peft": side(20, 10, 1.0, 0.25)},
        {"perpetune": side(50, 30, 1.0, 0.5), "peft": side(100, 10, 1.0, 0.25)},
        {"perpetune": side(22, 12, 1.0, 0.5), "peft": side(20, 10, 1.0, 0.25)},
    ]
    found = whole_run.compared(pairs, "peft", 0)
    assert found["ratio"] == pytest.approx(1.05) and found["throughput"] == pytest.approx(1 / 1.05)
    assert found["step"] == pytest.approx(1.2) and found["loss_apart"] == 0.25
    text = whole_run.page([{"kind": "encoder", "batch": 32, **found}], argparse.Namespace(tasks=2, steps=5))
    assert "| MiniLM | 32 | `Trainer` + peft | none | 22.0 | 20.0 | 1.050 | 0.952 | 1.050 | 1.200 |" in text


@pytest.mark.parametrize("kind, inputs", [("encoder", ("text",)), ("language", ("messages",))])
def test_both_sides_read_one_stream(tmp_path, kind, inputs):
    folder = whole_run.make_stream(tmp_path / "stream", kind, 2, 8, 4, 6)
    metric = {"metric": "exact_match"} if kind == "language" else {}
    stream = pt.load_stream(folder, **metric)
    assert stream.inputs == inputs and [(len(t.train), len(t.test)) for t in stream] == [(8, 4), (8, 4)]
    for task, (name, data) in zip(stream, read_stream(str(folder)), strict=True):
        assert task.name == name
        if kind == "language":
            asked = [json.loads(talk)[0]["content"] for talk in task.train["messages"]]
            assert asked == [row["messages"][0]["content"] for row in data["train"]]


def test_a_language_model_must_be_given(capsys):
    with pytest.raises(SystemExit):
        whole_run.main(["--kinds", "language"])
    assert "needs --model" in capsys.readouterr().err
