from __future__ import annotations

import json
import math

import pytest
import torch

from benchmarks import step_overhead


@pytest.fixture(scope="module")
def model(tiny_bert) -> str:
    return str(tiny_bert(width=8, layers=1))


def test_measures_every_rule_and_writes_records(model, tmp_path, capsys):
    file = tmp_path / "overhead.json"
    records = step_overhead.main(["--model", model, "--steps", "1", "--width", "32", "--json", str(file)])
    assert json.loads(file.read_text()) == records
    assert len({record["name"] for record in records}) == len(records) == 13 + 4 + 1
    assert all(math.isfinite(record["ratio"]) for record in records)
    measured = [record for record in records if "rule_ms" in record]
    assert all(record["ratio"] > 1 for record in measured)
    assert {record["layers"] for record in measured} == {2, 6}  # q and v; four square ones and the two of the MLP
    assert "product_l1" in capsys.readouterr().out


def test_a_rule_at_task_50_remembers_49_tasks(model):
    adapted = step_overhead.build(model, "q,v")
    (row,) = (r for r in step_overhead.rows("q,v") if (r.name, r.task) == ("orthogonal_absolute", 50))
    rule = step_overhead.at_task(row.make(), adapted, row.task, step_overhead.random_batch(adapted))
    assert {tuple(rows.shape) for rows in rule.state().values()} == {(49 * step_overhead.RANK, 8)}


@pytest.mark.parametrize("branch", ["kept", "fresh"])
def test_projection_protects_half_of_the_directions_of_every_input(model, branch):
    adapted = step_overhead.build(model, "all linear")
    (row,) = (r for r in step_overhead.rows("all linear") if r.name == f"subspace_projection, {branch}")
    rule = step_overhead.at_task(row.make(), adapted, row.task, step_overhead.random_batch(adapted))
    assert {tuple(kept.M.shape) for kept in rule._memory.inputs} == {(8, 4), (16, 8)}  # d x k
    protected = [site.weight for site in rule._sites(adapted)[0]]
    moved = [weight.detach() + torch.randn_like(weight) for weight in protected]
    for weight, value in zip(protected, moved, strict=True):
        weight.data.copy_(value)
    rule.on_update(())
    assert all(not torch.allclose(weight, value) for weight, value in zip(protected, moved, strict=True))


def test_a_wide_layer_is_measured_with_half_of_its_directions_in_use(monkeypatch):
    rules = []
    monkeypatch.setattr(step_overhead, "in_turns", lambda step, given, steps: [step(), rules.extend(given), {}][2:])
    record = step_overhead.measure_wide(64, 1)
    assert record["site"] == "q,v of one layer, d = 64, 2048 tokens" and record["layers"] == 2
    used = rules[0].guarantee()[3]
    assert used.name == "input directions in use" and used.value == 0.5


@pytest.mark.parametrize("option", [("--steps", "0", "1"), ("--width", "8", "32")])
def test_sizes_too_small_are_refused(option, capsys):
    name, value, least = option
    with pytest.raises(SystemExit):
        step_overhead.main([name, value])
    assert f"{name} must be {least} or more" in capsys.readouterr().err
