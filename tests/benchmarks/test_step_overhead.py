from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from benchmarks import step_overhead
from perpetune.rules import Rule


@pytest.fixture(scope="module")
def model(tiny_bert) -> str:
    return str(tiny_bert(width=8, layers=1))


def test_measures_every_rule_and_writes_records(model, tmp_path, capsys):
    file = tmp_path / "overhead.json"
    records = step_overhead.main(["--model", model, "--steps", "1", "--width", "32", "--json", str(file)])
    assert json.loads(file.read_text()) == records
    assert len({record["name"] for record in records}) == len(records) == 13 + 4 + 1 + 6
    assert all(math.isfinite(record["ratio"]) for record in records)
    measured = [record for record in records if "rule_ms" in record]
    assert all(record["ratio"] > 1 for record in measured)
    assert {record["layers"] for record in measured} == {0, 2, 6}  # none; q and v; the square ones and those of the MLP
    assert "product_l1" in capsys.readouterr().out


def test_only_the_sites_that_are_asked_for(model, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    records = step_overhead.main(["--model", model, "--steps", "1", "--sites", "Givens, all linear", "OFT, all linear"])
    assert [(r["name"].split(",")[0], r["layers"]) for r in records] == [("soft_orthogonal", 6), ("rotation_ball", 6)]
    assert {r["clock"] for r in records} == {"process_time"}


def test_rules_get_the_weights_before_the_step_that_they_watch():
    class Watching(Rule):
        def __init__(self, p: nn.Parameter) -> None:
            self.p, self.seen = p, []

        def watches(self):
            return [self.p]

        def on_update(self, before):
            self.seen += [before[0].item()]

    p = nn.Parameter(torch.zeros(()))
    rule = Watching(p)
    step_overhead.in_turns(lambda: p.data.add_(1), [rule], 2, warmup=1)
    assert rule.seen == [1, 2, 3]


@pytest.mark.parametrize("name", ["fixed_mask 0.3, embeddings free", "fixed_mask 0.005"])
def test_masks_are_chosen_by_gradients_of_the_batch(model, name):
    encoder = step_overhead.build(model, "all weights")
    (row,) = (r for r in step_overhead.rows("all weights") if r.name == name)
    rule = step_overhead.at_task(row.make(), encoder, 1, step_overhead.random_batch(encoder))
    kept, changed, _ = rule.guarantee()
    assert kept.value == kept.bound > 0 and changed.value == 0


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
    protected = [site.weight for group in rule._groups for site in group.sites]
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
