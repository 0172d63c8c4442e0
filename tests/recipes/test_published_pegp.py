"""PEGP's configurations tune what was published, no more and no less: counted on ViT-B/16."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load, save
from torch import nn
from transformers import ViTConfig, ViTModel

from perpetune.recipes import make_recipe
from perpetune.recipes.recipe import Recipe
from perpetune.rules import SubspaceProjection, TaskContext, attach, lora_pairs

CONFIGS = Path(__file__).parents[2] / "configs" / "benchmarks"
ADAPTER, LORA = 5 * 768 * 2 * 5, 5 * (768 + 3 * 768) * 5
PUBLISHED = {
    "adapter_5": ADAPTER,
    "pegp_adapter_5": ADAPTER,
    "pegp_adapter_10": 2 * ADAPTER,
    "lora_5": LORA,
    "pegp_lora_5": LORA,
    "pegp_lora_10": 2 * LORA,
    "pegp_prompt_10": 10 * 768 * 5,
    "pegp_prompt_20": 20 * 768 * 5,
    "pegp_prefix_10": 2 * 10 * 768 * 5,
    "pegp_prefix_20": 2 * 20 * 768 * 5,
}


def numbers(recipe: Recipe) -> int:
    with torch.device("meta"):
        model = recipe.tuner.attach(ViTModel(ViTConfig(), add_pooling_layer=False))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("file", ["pegp_cifar100.yaml", "pegp_imagenet_r.yaml"])
def test_configurations_train_the_published_numbers(file):
    assert (ADAPTER, LORA) == (38_400, 76_800)
    recipes = yaml.safe_load((CONFIGS / file).read_text(encoding="utf-8"))["recipes"]
    assert {r["name"]: numbers(Recipe.from_dict(r)) for r in recipes} == PUBLISHED


@pytest.mark.parametrize(
    "name, wanted",
    [("pegp_adapter", ADAPTER), ("pegp_lora", LORA), ("pegp_prompt", 38_400), ("pegp_prefix", 76_800)],
)
def test_released_recipes_train_the_published_numbers(name, wanted):
    recipe = make_recipe(f"{name}_released")
    assert numbers(recipe) == wanted
    assert Recipe.from_dict(recipe.to_dict()).to_dict() == recipe.to_dict()


def tiny(seed: int = 0) -> ViTModel:
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return ViTModel(ViTConfig(**shape, image_size=8, patch_size=4), add_pooling_layer=False)


def images(rows: int = 3) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(rows, 3, 8, 8)}


@torch.no_grad()
def outputs(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.eval()(**inputs).last_hidden_state


def shake(model: nn.Module) -> nn.Module:
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.2 * torch.randn_like(p)
    return model


def test_the_adapter_reads_what_the_attention_reads():
    """h = attention(norm(x)) + W_u gelu(W_d norm(x)), W_d from U(+-1/sqrt(d))."""
    model = make_recipe("pegp_adapter_released").tuner.attach(tiny())
    block = model.base_model.model.layers[0]
    down = block.attention.perpetune_adapter_down["default"].weight
    assert 0.9 / 4 < down.abs().max() <= 1 / 4
    shake(model)
    up, x = block.attention.perpetune_adapter_up["default"].weight, torch.randn(2, 5, 16)
    normed = block.layernorm_before(x)
    own, weights = block.attention.base_layer(normed)
    h, same = block.attention(normed)
    expected = own + torch.nn.functional.gelu(normed @ down.T) @ up.T
    torch.testing.assert_close(h, expected)
    assert weights is same is None or torch.equal(weights, same)


def test_the_lora_is_that_of_a_fused_layer():
    """[W_q; W_k; W_v] + s [B_q; B_k; B_v] A with one A, kept by training, stored and loaded, and merged."""
    tuner = make_recipe("pegp_lora_released").tuner
    model = shake(tuner.attach(tiny()))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    inputs = images()
    model(**inputs).last_hidden_state.square().mean().backward()
    optimizer.step()
    pairs = lora_pairs(model)
    assert len(pairs) == 6 and len({id(pair.A) for pair in pairs}) == 2
    assert len({id(pair.B) for pair in pairs}) == 6
    expected, again = outputs(model, inputs), tuner.attach(tiny())
    tuner.load(again, load(save(tuner.tensors(model))))
    assert torch.equal(outputs(again, inputs), expected)
    deltas = tuner.change(model).deltas()
    plain = tiny()
    with torch.no_grad():
        for name, p in plain.named_parameters():
            p += deltas.get(name, torch.zeros(()))
    torch.testing.assert_close(outputs(plain, inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["pegp_adapter_released", "pegp_lora_released"])
def test_what_is_published_can_be_protected(name):
    recipe, old = make_recipe(name), images()
    model, rule = shake(recipe.tuner.attach(tiny())), SubspaceProjection(1.0)
    rule.begin_task(TaskContext(model, 0))
    rule.end_task(TaskContext(model, 0, lambda: [{k: v[:1] for k, v in old.items()}]))
    before = outputs(model, {k: v[:1] for k, v in old.items()})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    attach(model, optimizer, [rule], index=1, batches=lambda: [images()])
    for _ in range(5):
        optimizer.zero_grad()
        model(**images()).last_hidden_state.square().mean().backward()
        optimizer.step()
    after = outputs(model, {k: v[:1] for k, v in old.items()})
    assert (after - before).norm() < 1e-5 * before.norm()
    assert all(m.holds is not False for m in rule.guarantee())
    assert math.isfinite(rule.guarantee()[0].value)
