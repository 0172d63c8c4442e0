"""Gradient checkpointing computes activations twice and changes nothing else: the same bits under every rule."""

from __future__ import annotations

import peft
import pytest
import torch

import perpetune as pt
from perpetune.rules import (
    RULES,
    FactorL1,
    FixedMask,
    InfLoRA,
    OrthogonalToPast,
    ProductL1,
    ReleasedProductL1,
    RotationBall,
    SoftOrthogonal,
    StepMask,
    SubspaceProjection,
    WeightProjection,
)
from perpetune.tuners import GivensConfig

TARGETS = ["q_proj", "v_proj"]
TRAINING = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3}


def lora():
    return peft.LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS)


def oft():
    return peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False, target_modules=TARGETS)


CASES = {
    "ProductL1": (lora, lambda: ProductL1(1e-3), "fresh"),
    "ReleasedProductL1": (lora, lambda: ReleasedProductL1(1e-2), "fresh"),
    "FactorL1": (lora, lambda: FactorL1(1e-3), "fresh"),
    "OrthogonalToPast": (lora, lambda: OrthogonalToPast(0.5), "fresh"),
    "SubspaceProjection": (lora, lambda: SubspaceProjection(0.9, branch="fresh"), "fresh"),
    "InfLoRA": (lora, lambda: InfLoRA(0.5, 0.9), "fresh"),
    "WeightProjection": (pt.AllWeights, WeightProjection, "kept"),
    "StepMask": (pt.AllWeights, lambda: StepMask(0.3, "update"), "kept"),
    "FixedMask": (pt.AllWeights, lambda: FixedMask(0.3, batch=4), "kept"),
    "RotationBall": (oft, lambda: RotationBall(1e-2), "fresh"),
    "SoftOrthogonal": (
        lambda: GivensConfig(form="quasi", target_modules=TARGETS),
        lambda: SoftOrthogonal(0.1),
        "fresh",
    ),
}


@pytest.fixture(scope="module")
def stream(word_stream):
    return pt.load_stream(word_stream, tasks=["films", "news"], pose="instruction", train_limit=8, test_limit=2)


def test_every_rule_is_here():
    assert {type(rule()).__name__ for _, rule, _ in CASES.values()} == {rule.__name__ for rule in RULES.values()}


@pytest.mark.parametrize("name", CASES)
def test_the_same_bits_with_and_without(name, tiny_lm, stream, tmp_path):
    tuner, rule, branch = CASES[name]
    folder = tiny_lm("llama")
    found = []
    for checkpointing in (False, True):
        recipe = pt.Recipe(tuner(), [rule()], pt.Merge() if branch == "fresh" else pt.Continue())
        training = {**TRAINING, "gradient_checkpointing": checkpointing}
        learner = pt.Learner(folder, recipe, tmp_path / str(checkpointing), training=training)
        result = learner.learn(stream)
        stored = result.commits[-1]
        files = [f for f in stored.manifest["files"] if f.endswith(".safetensors")]
        found.append({(f, key): t for f in files for key, t in stored.tensors(f).items()})
    without, with_it = found
    assert without.keys() == with_it.keys()
    assert all(torch.equal(without[key], with_it[key]) for key in without)
