"""What a language model will take, from its configuration alone."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import perpetune as pt
from perpetune.core.errors import ModelError
from perpetune.operations.plan_arithmetic import on_paper

SEVEN = {  # of LLaMA 7B
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096,
}  # fmt: skip
PARAMETERS = 6_738_415_616


@pytest.fixture(scope="module")
def stream(word_stream):
    return pt.load_stream(word_stream, tasks=["films", "news"], pose="instruction")


@pytest.fixture(scope="module")
def seven(tmp_path_factory):
    """A folder with the configuration of a model of 7B, and nothing else."""
    folder = tmp_path_factory.mktemp("seven")
    LlamaConfig(**SEVEN, dtype="bfloat16", architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    return folder


def plan(model, stream, recipe="lora", training=None, **options):
    training = {"per_device_train_batch_size": 4, **(training or {})}
    return on_paper(pt.Learner(model, recipe, training=training, max_length=512, **options), stream)


def test_seven_billion_parameters_are_planned_without_weights(seven, stream):
    paper = plan(seven, stream)
    assert (paper.parameters, paper.trainable, paper.precision) == (PARAMETERS, 32 * 2 * 2 * 8 * 4096, "bfloat16")
    assert paper.parts["weights"] == 2 * PARAMETERS
    assert paper.parts["gradients"] == 4 * paper.trainable and paper.parts["optimizer"] == 8 * paper.trainable
    assert paper.parts["adapter"] == 2 * 4 * paper.trainable  # that of the task before stays beside the weights
    assert paper.disk == 4 * paper.trainable and "with gradient_checkpointing" in paper.text()
    packed = plan(seven, stream, quantization="nf4", training={"gradient_checkpointing": True})
    outside = 2 * 32000 * 4096 + 65 * 4096  # embeddings, the last layer, norms
    assert packed.parts["weights"] == (PARAMETERS - outside) * 9 // 16 + 2 * outside
    assert packed.parts["activations"] < paper.parts["activations"] / 4 and packed.other == paper.parts["activations"]
    assert packed.memory < 8e9 < 2e10 < paper.memory


def test_weights_are_what_the_model_takes(tiny_lm, stream):
    folder = tiny_lm("llama", width=64)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert plan(folder, stream).parts["weights"] == sum(p.numel() * p.element_size() for p in model.parameters())
    pytest.importorskip("bitsandbytes")
    from perpetune.models.language_loading import load_language_model

    packed = load_language_model(folder, quantization="nf4", dtype="bfloat16").model
    states = [p.quant_state for p in packed.parameters() if hasattr(p, "quant_state")]
    held = sum(p.numel() * p.element_size() for p in packed.parameters())
    held += sum(state.absmax.numel() * state.absmax.element_size() for state in states)
    assert plan(folder, stream, quantization="nf4", dtype="bfloat16").parts["weights"] == held


@pytest.mark.parametrize("recipe", ["lora", "pegp_lora_fresh", "child_tuning_d"])
def test_disk_is_what_a_commit_takes(recipe, tiny_lm, stream, tmp_path):
    folder = tiny_lm("llama", width=64)
    training = {"max_steps": 2, "per_device_train_batch_size": 4}
    paper = plan(folder, stream, recipe)
    result = pt.Learner(folder, recipe, tmp_path, training=training).learn(stream)
    written = ("adapter_model.safetensors", "changed.safetensors", "rules.safetensors")
    files = [result.commits[-1].path / name for name in written if result.commits[-1].has(name)]
    tensors = [t for f in files for t in result.commits[-1].tensors(f.name).values()]
    assert sum(t.numel() * t.element_size() for t in tensors) == pytest.approx(paper.disk + paper.once, rel=0.02)


def test_other_models_and_missing_configurations(tmp_path, tiny_bert, word_stream, stream):
    assert plan(tiny_bert(), pt.load_stream(word_stream, tasks=["films"])) is None
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing"}), encoding="utf-8")
    with pytest.raises(ModelError, match="cannot read the configuration"):
        plan(tmp_path, stream)


def test_no_weight_is_made(seven, stream, monkeypatch):
    made = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: made.append(t := empty(*a, **k)) or t)
    plan(seven, stream)
    assert not any(t.numel() > 10**6 and t.device.type != "meta" for t in made)


def test_the_batch_is_that_of_language_models(seven, stream):
    paper = on_paper(pt.Learner(seven, "lora", max_length=512), stream)
    assert paper.tokens == 8 * 512
