from __future__ import annotations

import errno
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from perpetune.core.errors import ConfigError, RunError
from perpetune.core.measurement import Measurement
from perpetune.metrics.accuracy import FORMULAS, AccuracyMatrix, summary
from perpetune.metrics.conventions import in_convention
from perpetune.metrics.records import (
    ResultRecord,
    aggregate,
    make_record,
    markdown_table,
    read_records,
    table,
    write_records,
)

NAN = float("nan")
SRC = str(Path(__file__).resolve().parents[2] / "src")
COST = {"task": "a", "train_seconds": 1.5, "evaluate_seconds": 0.5, "steps": np.int64(10), "peak_memory_bytes": None}
FACTS = {
    "recipe": "nlora",
    "seed": 0,
    "scenario": "class",
    "head": "ridge",
    "model": "minilm",
    "stream": "digits",
    "train_seconds": 3.0,
    "evaluate_seconds": 1.0,
    "steps": 20,
    "trainable_parameters": 1000,
    "per_task": [{**COST, "disk_bytes": 7}],
}


def run(final: float = 0.6, first: float = 0.8, **facts: object) -> ResultRecord:
    matrix = AccuracyMatrix([[first, NAN], [final, 0.9]], [10, 30], [NAN, NAN], ("a", "b"))
    return make_record(matrix, FACTS | facts)


def joint(**facts: object) -> ResultRecord:
    matrix = AccuracyMatrix([[NAN, NAN], [0.9, 0.9]], [10, 30], [NAN, NAN], ("a", "b"))
    return make_record(matrix, FACTS | {"recipe": "joint"} | facts)


def test_a_record_is_the_matrix_its_figures_and_the_facts():
    promises = [Measurement("drift", 1e-7, 1e-6, source="Merge"), {"name": "x", "value": math.inf}]
    record = run(guarantees=promises, flips=0.25, run=Path("runs") / "nlora", seed=np.int64(3))
    assert record.matrix == [[0.8, None], [0.6, 0.9]] and record.baseline == [None, None]
    assert record.test_sizes == [10, 30] and record.tasks == ["a", "b"] and record.seed == 3
    assert {
        k: getattr(record, k) for k in FORMULAS if k not in ("flips", "routing_accuracy", "final_accuracy_macro")
    } == summary(record.accuracy_matrix())
    assert record.final_accuracy == pytest.approx(0.75) and record.final_accuracy_micro == pytest.approx(0.825)
    assert record.forward_transfer is None and record.flips == 0.25 and record.formulas == FORMULAS
    assert record.guarantees[0]["holds"] is True and record.guarantees[1]["value"] is None
    assert record.per_task[0]["steps"] == 10 and record.run == os.path.join("runs", "nlora")


def test_records_survive_the_file_and_hold_no_nan(tmp_path):
    path = tmp_path / "new" / "results.json"
    records = [run(guarantees=[Measurement("drift", NAN, 1.0)]), joint(seed=1)]
    write_records(path, records)
    assert read_records(path) == records
    text = path.read_text()
    assert "NaN" not in text and isinstance(json.loads(text), list)
    assert set(json.loads(text)[0]) == set(ResultRecord.model_fields)
    assert ResultRecord(**records[0].model_dump()) == records[0]


def test_a_record_read_back_can_be_told_in_another_convention(tmp_path):
    write_records(tmp_path / "r.json", [run()])
    (record,) = read_records(tmp_path / "r.json")
    assert in_convention(record.accuracy_matrix(), "trace")["BWT"] == pytest.approx(-0.1)


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"final_accuracy": 1.0}, "`final_accuracy` of a record is computed"),
        ({"seed": "many"}, "`seed`"),
        ({"colour": "red"}, "`colour`"),
        ({"per_task": [COST]}, "`per_task.0.disk_bytes`"),
        ({"train_seconds": NAN}, "`train_seconds`"),
    ],
)
def test_facts_that_do_not_fit_are_refused(facts, says):
    with pytest.raises(ConfigError, match=says):
        run(**facts)


def damaged(text: str, change: str) -> str:
    rows = json.loads(text)
    if change == "short":
        return text[: len(text) // 2]
    if change == "nan":
        return text.replace("0.8", "NaN", 1)
    if change == "object":
        return json.dumps(rows[0])
    if change == "binary":
        return "\x00"
    if change == "number":
        return json.dumps([*rows, 3])
    if change == "missing":
        del rows[1]["plasticity"]
    if change == "ragged":
        rows[1]["matrix"][0] = [0.5]
    return json.dumps(rows)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("short", "not a JSON list"),
        ("nan", "NaN is not JSON"),
        ("object", "but a dict"),
        ("binary", "not a JSON list"),
        ("number", "record 2"),
        ("missing", "record 1: `plasticity`: Field required"),
        ("ragged", "record 1.*size of tasks, 2"),
    ],
)
def test_a_malformed_file_is_refused_in_one_line(tmp_path, change, says):
    path = tmp_path / "results.json"
    write_records(path, [run(), run(seed=1)])
    path.write_text(damaged(path.read_text(), change))
    with pytest.raises(ConfigError, match=says) as caught:
        read_records(path)
    assert "\n" not in str(caught.value)


def test_no_file_and_bytes_that_are_no_text_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot read results"):
        read_records(tmp_path / "none.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe[]")
    with pytest.raises(ConfigError, match="not a JSON list"):
        read_records(tmp_path / "bytes.json")


def test_a_full_disk_leaves_the_old_file_and_no_scraps(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_records(path, [run()])
    old = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="No space left"):
        write_records(path, [run(), run(seed=1)])
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["results.json"]


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        write_records(tmp_path / "file" / "results.json", [run()])


def test_aggregate_is_mean_and_sample_deviation_over_seeds():
    finals = (0.5, 0.6, 0.8)
    entries = aggregate([joint()] + [run(final, seed=s) for s, final in enumerate(finals)])
    assert [(e["recipe"], e["scenario"], e["head"], e["seeds"]) for e in entries] == [
        ("joint", "class", "ridge", 1),
        ("nlora", "class", "ridge", 3),
    ]
    accuracies = [(f + 0.9) / 2 for f in finals]
    assert entries[1]["final_accuracy"]["mean"] == pytest.approx(np.mean(accuracies))
    assert entries[1]["final_accuracy"]["std"] == pytest.approx(np.std(accuracies, ddof=1))
    assert entries[1]["train_seconds"] == {"mean": 3.0, "std": 0.0}
    assert entries[0]["final_accuracy"] == {"mean": pytest.approx(0.9), "std": None}
    assert entries[0]["forgetting"] == entries[1]["forward_transfer"] == {"mean": None, "std": None}
    json.dumps(entries, allow_nan=False)


def test_a_metric_undefined_for_one_seed_has_no_mean():
    entries = aggregate([run(flips=0.5), run(flips=None, seed=1)])
    assert entries[0]["flips"] == {"mean": None, "std": None}
    assert entries[0]["final_accuracy"]["std"] == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({}, "seed 0 is there twice"),
        ({"seed": 1, "model": "bert"}, "bert, minilm"),
        ({"seed": 1, "stream": "x"}, "stream"),
    ],
)
def test_a_group_that_mixes_runs_is_refused(facts, says):
    with pytest.raises(ConfigError, match=says):
        aggregate([run(), run(**facts)])


@pytest.fixture
def aggregated() -> list[dict]:
    some = [run(f, seed=s) for s, f in enumerate((0.5, 0.6, 0.7))]
    return aggregate([*some, run(0.8, head="linear", recipe="lora[8]"), joint(), run(scenario="task")])


def test_markdown_table_by_hand(aggregated):
    text = markdown_table(aggregated, "class")
    assert text.splitlines()[:5] == [
        "| recipe | ridge | linear |",
        "| --- | ---: | ---: |",
        "| nlora | 75.0 ± 5.0 (f 20.0) | – |",
        "| lora[8] | – | 85.0 (f 0.0) |",
        "| joint | 90.0 | – |",
    ]
    assert FORMULAS["final_accuracy"] in text and FORMULAS["forgetting"] in text


def test_other_metrics_and_undefined_ones(aggregated):
    assert "| nlora | 20.0 ± 10.0 | – |" in markdown_table(aggregated, "class", "forgetting")
    assert "| joint | – | – |" in markdown_table(aggregated, "class", "plasticity")


def test_rich_table_shows_the_same_cells(aggregated):
    console = Console(file=io.StringIO(), width=120)
    console.print(table(aggregated, "class"))
    shown = console.file.getvalue()
    for cell in ("75.0 ± 5.0 (f 20.0)", "85.0 (f 0.0)", "lora[8]", "ridge", "class-incremental"):
        assert cell in shown


def test_a_table_of_nothing_says_what_there_is(aggregated):
    with pytest.raises(ConfigError, match="did you mean `forgetting`"):
        table(aggregated, "class", "forgeting")
    with pytest.raises(ConfigError, match="no results are domain-incremental: known are: class, task"):
        markdown_table(aggregated, "domain")
    with pytest.raises(ConfigError, match="none at all"):
        table([], "class")


def test_no_heavy_import():
    """`perpetune --help` and reading results must not pay for torch or rich."""
    code = (
        "import sys, perpetune.metrics.records, perpetune.metrics.conventions; "
        "sys.exit(', '.join(m for m in ('torch', 'rich', 'datasets', 'transformers') if m in sys.modules) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": SRC}
    )
    assert done.returncode == 0, done.stderr
