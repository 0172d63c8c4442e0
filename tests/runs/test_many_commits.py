"""What reading a run costs with many tasks: every file once, and work that grows like the T x T figures."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import perpetune as pt
from perpetune.core.files import json_text, read_arrays
from perpetune.report import render
from perpetune.report.collect import report_data
from perpetune.runs.commit import Commit
from perpetune.runs.directory import Run

PROMISE = {"name": "kept", "value": 0.0, "bound": 1.0, "unit": "", "source": "Rule", "note": "", "holds": True}


def run_of(path, tasks):
    """A run of so many tasks of four test examples, all evaluated after every task."""
    names = [f"t{i}" for i in range(tasks)]
    config = {
        "model_name": "m",
        "model": {"fingerprint": "x"},
        "stream": {
            "name": "s",
            "scenario": "class",
            "inputs": ["text"],
            "tasks": names,
            "labels": [f"c{i}" for i in range(2 * tasks)],
            "source": {"source": str(path / "gone")},
        },
        "recipe": {"name": "lora", "consolidation": {"type": "Merge"}},
        "training": {},
        "seed": 0,
    }
    run = Run.open(path, config)
    run.commit("untouched", {"predictions.safetensors": {}}, {"learned": [], "classes": [], "guarantees": []})
    for i, name in enumerate(names):
        found = {}
        for j in range(i + 1):
            found[f"target/{names[j]}"] = torch.tensor([2 * j, 2 * j + 1] * 2, dtype=torch.int32)
            for scenario in ("class", "task"):
                found[f"linear/{scenario}/{names[j]}"] = torch.tensor([2 * j] * 4, dtype=torch.int32)
        facts = {"learned": names[: i + 1], "classes": [], "heads": ["linear"]}
        facts["guarantees"] = [{**PROMISE, "task": name}]
        run.commit(name, {"predictions.safetensors": found}, facts)
        run.note("task", task=name, train_seconds=1.0, evaluate_seconds=1.0, steps=1)
    run.close()
    return path


def work(function):
    count = 0

    def counted(frame, event, arg):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(counted)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def whole_report(path):
    result = pt.Result(path)
    result.summary()
    return render(report_data([result], result.records(), "run"))


def test_a_report_reads_every_file_once_and_works_like_its_figures(tmp_path, monkeypatch):
    """Four times the tasks have sixteen times the figures; a pass over all of them for each task would be 64 times."""
    small, large = run_of(tmp_path / "small", 12), run_of(tmp_path / "large", 48)
    whole_report(small)  # templates are compiled once
    read, arrays = [], Commit.arrays
    monkeypatch.setattr(Commit, "arrays", lambda self, name: read.append(self.path.name) or arrays(self, name))
    few = work(lambda: whole_report(small))
    read.clear()
    many = work(lambda: whole_report(large))
    assert many < 10 * few, (few, many)  # it is the linear part that is large at this size
    assert len(read) == len(set(read)) == 49


def test_figures_are_those_of_the_predictions(tmp_path):
    result = pt.Result(run_of(tmp_path / "run", 5))
    matrix = result.matrix("linear", "class")
    assert np.array_equal(np.isnan(matrix.values), np.triu(np.ones((5, 5)), 1) > 0)
    assert (matrix.values[np.tril_indices(5)] == 0.5).all()
    assert result.records()[0].flips == 0.0


@pytest.mark.parametrize("kind", [torch.int32, torch.int64, torch.float32, torch.float64, torch.bool, torch.uint8])
def test_arrays_are_those_that_safetensors_reads(kind, tmp_path):
    from safetensors.numpy import load_file

    tensors = {"b/x": torch.arange(6).to(kind).reshape(2, 3), "a": torch.tensor([1, 0]).to(kind)}
    tensors |= {"other": torch.tensor([3], dtype=torch.int16), "empty": torch.zeros(0), "wide": torch.ones(2).double()}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"made": "here"})
    ours, theirs = read_arrays((tmp_path / "x.safetensors").read_bytes()), load_file(tmp_path / "x.safetensors")
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key].dtype == value.dtype and np.array_equal(ours[key], value)


def test_a_kind_of_number_that_is_not_known_is_refused(tmp_path):
    save_file({"x": torch.zeros(2, dtype=torch.bfloat16)}, tmp_path / "x.safetensors")
    with pytest.raises(pt.RunError, match="newer perpetune"):
        read_arrays((tmp_path / "x.safetensors").read_bytes())


def test_a_commit_names_a_thousand_tasks_on_one_line_and_without_work_for_each():
    content = {"learned": [f"t\n{i}" for i in range(1000)], "classes": [], "heads": [{"a": [1, None]}], "size": 0.5}
    text = json_text(content)
    assert json.loads(text) == content and len(text.splitlines()) < 20
    few = {**content, "learned": content["learned"][:2]}
    assert work(lambda: json_text(content)) == work(lambda: json_text(few))
    short = {"b": [1, 2], "a": {"d": "x", "c": [{"e": "\u2028"}]}}
    assert json_text(short) == json.dumps(short, indent=1, sort_keys=True).replace("[\n  1,\n  2\n ]", "[1, 2]")
