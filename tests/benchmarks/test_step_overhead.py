from __future__ import annotations

import json
import math

import pytest

from benchmarks import step_overhead


@pytest.fixture(scope="module")
def model(tiny_bert) -> str:
    return str(tiny_bert(width=8, layers=1))


def test_measures_every_rule_and_writes_records(model, tmp_path, capsys):
    file = tmp_path / "overhead.json"
    records = step_overhead.main(["--model", model, "--steps", "1", "--json", str(file)])
    assert json.loads(file.read_text()) == records
    assert len({record["name"] for record in records}) == len(records) == 13
    assert all(math.isfinite(record["ratio"]) for record in records)
    measured = [record for record in records if "rule_ms" in record]
    assert all(record["ratio"] > 1 for record in measured)
    assert {record["layers"] for record in measured} == {2, 6}  # q and v; four square ones and the two of the MLP
    assert "product_l1" in capsys.readouterr().out


def test_a_rule_at_task_50_remembers_49_tasks(model):
    adapted = step_overhead.build(model, "q,v")
    (row,) = (r for r in step_overhead.rows("q,v") if (r.name, r.task) == ("orthogonal_absolute", 50))
    rule = step_overhead.at_task(row.make(), adapted, row.task)
    assert {tuple(rows.shape) for rows in rule.state().values()} == {(49 * step_overhead.RANK, 8)}


def test_steps_below_one_are_refused(capsys):
    with pytest.raises(SystemExit):
        step_overhead.main(["--steps", "0"])
    assert "--steps must be 1 or more" in capsys.readouterr().err
