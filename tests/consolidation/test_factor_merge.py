"""One LoRA, its A replaced and its B moved by every task (SLAO)."""

from __future__ import annotations

import math

import peft
import pytest
import torch

import perpetune as pt
from perpetune.consolidation import FactorMerge
from perpetune.consolidation.factor_merge import START, merged_factors, next_start, orthonormal_rows
from perpetune.core.errors import ConfigError
from perpetune.learning.kept import newest_adapter
from perpetune.runs.directory import Run

TRAINING = {"max_steps": 3, "per_device_train_batch_size": 8, "learning_rate": 5e-3}
A, B = "layer.lora_A.weight", "layer.lora_B.weight"


def factors(tasks: int) -> list[dict[str, torch.Tensor]]:
    return [
        {A: torch.randn(3, 7, dtype=torch.float64), B: torch.randn(5, 3, dtype=torch.float64)} for _ in range(tasks)
    ]


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_a_is_the_newest_and_b_goes_a_share_of_the_way(power):
    trained, merged = factors(4), {}
    expected = trained[0][B]
    for i, task in enumerate(trained, 1):
        merged = merged_factors(merged, task, i**-power)
        share = 1 / i**power
        expected = (1 - share) * expected + share * task[B]
        assert torch.equal(merged[A], task[A])
        torch.testing.assert_close(merged[B], expected, rtol=0, atol=1e-14)
    if power == 1:
        torch.testing.assert_close(merged[B], sum(t[B] for t in trained) / 4, rtol=0, atol=1e-14)


def test_the_next_task_starts_from_what_was_trained_with_orthonormal_rows():
    (trained,) = factors(1)
    start = next_start(trained)
    assert torch.equal(start[B], trained[B])
    Q = start[A]
    torch.testing.assert_close(Q @ Q.T, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-14)
    R = (trained[A] @ Q.T).T  # A^T = Q^T R: upper triangular, with a positive diagonal
    torch.testing.assert_close(R, R.triu(), rtol=0, atol=1e-13)
    assert (R.diagonal() > 0).all()
    torch.testing.assert_close(R.T @ Q, trained[A], rtol=0, atol=1e-13)  # the rows span what they spanned
    wide = torch.randn(4, 2)
    assert orthonormal_rows(wide) is wide


@pytest.fixture(scope="module")
def run(model, stream, tmp_path_factory):
    learner = pt.Learner(model, "slao", tmp_path_factory.mktemp("slao") / "run", training=TRAINING, max_length=16)
    return learner, learner.learn(stream)


def test_a_run_holds_the_equation_and_one_adapter_that_plain_peft_loads(run, stream):
    learner, result = run
    merged, sizes = {}, set()
    for i, commit in enumerate(result.commits[1:], 1):
        adapter, start = commit.tensors("adapter_model.safetensors"), commit.tensors(START)
        for name, value in adapter.items():
            if "lora_B" in name:  # the start of the next task has what this one trained
                old = merged.get(name, start[name])
                torch.testing.assert_close(value, old + (start[name] - old) / math.sqrt(i))
                merged[name] = value
            else:
                assert torch.equal(start[name], orthonormal_rows(value))
        sizes.add(sum((commit.path / f).stat().st_size for f in ("adapter_model.safetensors", START)))
    assert len(sizes) == 1
    kept = newest_adapter(learner.recipe, Run.read(result.path).commits)  # where somebody else's trainer goes on
    assert all(torch.equal(kept[name], value) for name, value in start.items())
    examples = learner.backbone.prepare(stream.tasks[0].test.select(range(4)))
    now = learner.backbone.features(examples, 4)
    base, _ = learner.fresh()
    base.model = peft.PeftModel.from_pretrained(base.model, str(result.commits[-1].path))
    torch.testing.assert_close(base.features(examples, 4), now)
    assert all(g["holds"] is not False for g in result.guarantees if g["source"] == "FactorMerge")


def test_a_task_begins_where_the_one_before_it_ended_and_not_where_the_model_is(model, stream):
    learner = pt.Learner(model, "slao", training={**TRAINING, "learning_rate": 0.0}, max_length=16)
    result = learner.learn(stream)  # nothing is trained: B' stays as it begins, at 0
    first, last = (result.commits[i].tensors(START) for i in (1, -1))
    assert all(torch.allclose(first[name], last[name], atol=1e-6) for name in first)


def test_what_has_no_two_matrices_is_refused(model, stream):
    for tuner in (pt.AllWeights(), peft.LoraConfig(r=2, use_dora=True, target_modules=["query"])):
        with pytest.raises(ConfigError, match="plain LoRA"):
            pt.Learner(model, pt.Recipe(tuner, [], FactorMerge()), training=TRAINING).learn(stream)
    words = pt.Recipe(peft.LoraConfig(r=2, target_modules=["word_embeddings", "query"]), [], FactorMerge())
    with pytest.raises(ConfigError, match="linear layers"):
        pt.Learner(model, words, training=TRAINING).learn(stream)
    with pytest.raises(ConfigError, match="power"):
        FactorMerge(0)
