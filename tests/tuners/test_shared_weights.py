"""A weight that several modules own is not tuned through one of them: neither merged nor exported would it be right."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

from perpetune import Learner, ModelError, load_stream
from perpetune.models.loading import load_language_model
from perpetune.tuners import as_tuner


def tied(tiny_lm):
    return load_language_model(tiny_lm("qwen2")).model


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": r".*\.(q_proj|embed_tokens)"},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
)
def test_a_weight_that_two_modules_own_is_refused(tiny_lm, settings):
    model = tied(tiny_lm)
    names = [name for name, _ in model.named_modules()]
    for do in ("check", "attach"):
        with pytest.raises(ModelError, match="shares its weight with .*leave .* out of the tuner's targets, or untie"):
            getattr(as_tuner(peft.LoraConfig(**settings)), do)(model)
    assert [name for name, _ in model.named_modules()] == names


def test_layers_that_are_there_twice_are_refused(tiny_lm):
    tuner = as_tuner(peft.LoraConfig(target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]]))
    with pytest.raises(ModelError, match="layer_replication"):
        tuner.attach(load_language_model(tiny_lm("llama")).model)


def test_a_linear_layer_of_two_owners_is_refused_among_all():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = type("Config", (), {"get": lambda *a: None, "to_dict": dict})()
            self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight

    with pytest.raises(ModelError, match="`first` shares its weight with `second`"):
        as_tuner(peft.LoraConfig(target_modules=["first"])).check(Twice())
    as_tuner(peft.LoraConfig(target_modules=["third"])).check(Twice())


@pytest.mark.parametrize("targets", ["query_value", "all-linear"])
def test_what_is_not_shared_is_tuned(tiny_lm, targets):
    tuner = as_tuner(peft.LoraConfig(target_modules=targets, init_lora_weights=False))
    model = tied(tiny_lm)
    kept = model.lm_head.weight.detach().clone()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    attached = tuner.attach(model)
    changed = tuner.change(attached).deltas()
    assert changed and not any("lm_head" in name for name in changed)
    assert torch.equal(kept, model.lm_head.weight)


def test_an_untied_head_is_tuned(tiny_lm):
    tuner = as_tuner(peft.LoraConfig(target_modules=["lm_head"]))
    assert any("lm_head" in n for n, _ in tuner.attach(load_language_model(tiny_lm("llama")).model).named_modules())


def test_a_run_is_refused_before_it_writes_anything(tiny_lm, word_stream, tmp_path):
    stream = load_stream(word_stream, tasks=["films"], pose="instruction", train_limit=4, test_limit=2)
    recipe = {"name": "lora", "target": ["lm_head"]}
    with pytest.raises(ModelError, match="`lm_head` shares its weight with `model.embed_tokens`"):
        Learner(tiny_lm("qwen2"), recipe, tmp_path / "run").learn(stream)
    assert not (tmp_path / "run").exists()
