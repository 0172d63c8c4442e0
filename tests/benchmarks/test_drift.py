"""Projection on a small transformer, in fp64 and fp32: what must not move, and what moves if it is not enforced."""

from __future__ import annotations

import pytest
import torch

from benchmarks.drift import RECIPES, Row, course, main, random_task, real, small

EXACT = {torch.float64: 1e-12, torch.float32: 1e-6}
OPEN = ("pegp_adapter", "pegp_lora", "pegp_lora_fresh", "gpm")  # the theory leaves them room for a new task


def learn(recipe: str, form: str, dtype: torch.dtype = torch.float32, steps: int = 60) -> Row:
    return course(small(dtype), recipe, form, random_task(2, 2, 1), random_task(16, 4, 2), (20, steps), 3e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("recipe", RECIPES)
def test_old_outputs_stay(recipe, dtype):
    """AdamW with decay and the momentum of task 1, everything protected."""
    row = learn(recipe, "update", dtype, steps=30)
    assert row.drift <= EXACT[dtype]
    assert row.promises_kept is True


@pytest.mark.parametrize("recipe", OPEN)
def test_and_the_new_task_is_learned(recipe):
    row = learn(recipe, "both", steps=120)
    assert row.drift <= 1e-6 and row.loss < 0.25


@pytest.mark.parametrize("recipe", [*OPEN, "pegp_bias"])
def test_projecting_the_gradient_alone_drifts(recipe):
    """The control: without it, what is shown above would prove nothing."""
    assert learn(recipe, "gradient").drift > 0.1


def test_the_command_prints_a_table_and_writes_rows(tmp_path, capsys):
    rows = main(["--small", "--recipes", "pegp_lora", "--steps", "2", "3", "--json", str(tmp_path / "rows.json")])
    assert [r.protected for r in rows] == ["none", "gradient", "update", "both"]
    assert "| pegp_lora |" in capsys.readouterr().out and (tmp_path / "rows.json").is_file()


@pytest.mark.real
@pytest.mark.parametrize("recipe", ["pegp_lora_fresh", "pegp_adapter"])
def test_old_outputs_of_minilm_stay(recipe, minilm, streams_dir):
    """The benchmark's own course of 300 steps is in docs/explanation/projection.md."""
    base, old, new = real(str(minilm), streams_dir / "cl-benchmark", torch.float32)
    row = course(base, recipe, "update", old, new, (3, 6), 1e-3)
    assert 0 < row.drift <= 1e-6 and row.promises_kept is True
