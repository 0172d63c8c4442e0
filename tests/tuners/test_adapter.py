"""Bottleneck adapters: their equations, where they stand, and what they refuse."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from perpetune.core.errors import ConfigError, ModelError
from perpetune.rules import SubspaceProjection, attach
from perpetune.tuners import AdapterConfig, PeftTuner


def _layer(config, base):
    model = nn.ModuleDict({"f": base}).double()
    tuned = peft.inject_adapter_in_model(config, model, adapter_name="task_0001")
    for p in tuned.parameters():
        nn.init.normal_(p)
    return tuned["f"]


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "tanh"])
@pytest.mark.parametrize("base", [nn.Linear(5, 3), Conv1D(3, 5)], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("form", ["parallel", "sequential"])
def test_equation(form, base, activation):
    """h = f(x) + W_u act(W_d x), or of f(x), in fp64."""
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    config = AdapterConfig(bottleneck=2, form=form, activation=activation, target_modules=["f"])
    layer = _layer(config, base)
    W = base.weight if isinstance(base, nn.Linear) else base.weight.T
    f = x @ W.T + base.bias
    W_d, W_u = layer.perpetune_adapter_down["task_0001"].weight, layer.perpetune_adapter_up["task_0001"].weight
    assert W_d.shape == (2, 5 if form == "parallel" else 3) and W_u.shape == (3, 2)
    act = {"gelu": nn.functional.gelu, "relu": torch.relu, "silu": nn.functional.silu, "tanh": torch.tanh}[activation]
    h = f + act((x if form == "parallel" else f) @ W_d.T) @ W_u.T
    torch.testing.assert_close(layer(x), h, rtol=1e-12, atol=1e-12)


def test_start():
    """W_u is 0; W_d has the spread 2 / d_in of Kaiming, and no biases."""
    layer = peft.inject_adapter_in_model(
        AdapterConfig(bottleneck=400, target_modules=["f"]), nn.ModuleDict({"f": nn.Linear(100, 7)})
    )["f"]
    down, up = layer.perpetune_adapter_down["default"], layer.perpetune_adapter_up["default"]
    assert not up.weight.any() and down.bias is None and up.bias is None
    assert down.weight.var().item() == pytest.approx(2 / 100, rel=0.05)


@pytest.mark.parametrize(
    ("kind", "count", "settings"),
    [
        ("bert", 4, {}),
        ("deberta-v2", 4, {}),
        ("albert", 2, {}),  # one layer, used again and again
        ("mpnet", 4, {}),
        ("modernbert", 4, {}),
        ("distilbert", 4, {"n_layers": 2}),
        ("vit", 4, {}),
        ("dinov2", 4, {}),
        ("llama", 4, {}),
        ("phi", 4, {}),
        ("gpt2", 4, {"n_layer": 2}),
        ("gpt_neox", 4, {}),
        ("opt", 4, {}),
        ("t5", 10, {"num_layers": 2}),
        ("bart", 10, {"encoder_layers": 2, "decoder_layers": 2}),
    ],
)
def test_outputs_of_blocks_are_found(kind, count, settings):
    """One at the end of every attention and of every feed-forward network; poolers and inner layers stay out."""
    settings = settings or {"num_hidden_layers": 2}
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(kind, **settings))
        tuned = PeftTuner(AdapterConfig(bottleneck=2)).attach(model)
    config = tuned.get_base_model().config
    layers = [m for m in tuned.modules() if hasattr(m, "perpetune_adapter_up")]
    assert len(layers) == count
    width = getattr(config, "hidden_size", None) or config.d_model
    assert {m.perpetune_adapter_up["default"].out_features for m in layers} == {width}


def test_both_towers_of_siglip_and_not_its_pooling_attention(families):
    """The pooling head reads the weights of its `out_proj` and never calls it."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    model = PeftTuner(AdapterConfig(bottleneck=2)).attach(SiglipVisionModel(config))
    keys = [k for k, m in model.named_modules() if hasattr(m, "perpetune_adapter_up")]
    assert len(keys) == 5 and not any("head.attention" in k for k in keys)
    with pytest.raises(ModelError, match="may never be called"):
        PeftTuner(AdapterConfig(target_modules=["out_proj"])).attach(SiglipVisionModel(config))


def test_where_no_block_output_is_known():
    model = nn.ModuleDict({"first": nn.Linear(2, 2), "second": nn.Linear(2, 2)})
    with pytest.raises(ModelError, match="first, second"):
        PeftTuner(AdapterConfig()).attach(model)
    with pytest.raises(ModelError, match="LayerNorm"):
        PeftTuner(AdapterConfig(target_modules=["norm"])).attach(nn.ModuleDict({"norm": nn.LayerNorm(2)}))


def test_block_outputs_serve_other_tuners_too(families):
    model = PeftTuner(peft.LoraConfig(r=2, target_modules="block_outputs")).attach(families["vit"].model())
    assert sum(isinstance(m, peft.tuners.lora.LoraLayer) for m in model.modules()) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bottleneck": 0}, "bottleneck"),
        ({"form": "serial"}, "form"),
        ({"activation": "sigmoid"}, "not 0 at 0"),
        ({"activation": "prelu"}, "trained itself"),
        ({"activation": "gulu"}, "did you mean .*`gelu`"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ConfigError, match=message):
        AdapterConfig(**settings)


def test_every_activation_that_is_taken_is_0_at_0():
    taken = []
    for name in ACT2FN:
        try:
            taken.append(AdapterConfig(activation=name).activation)
        except ConfigError:
            continue
    assert {"gelu", "relu", "silu", "gelu_new", "quick_gelu", "tanh", "relu2"} <= set(taken)
    assert all(not ACT2FN[name](torch.zeros(3)).any() for name in taken)


def test_merging_is_refused_at_both_doors(families):
    model = peft.get_peft_model(families["bert"].model(), AdapterConfig(bottleneck=2))
    layer = next(m for m in model.modules() if hasattr(m, "perpetune_adapter_up"))
    for merge in (model.merge_adapter, model.merge_and_unload, layer.merge):
        with pytest.raises(ModelError, match="not linear"):
            merge()
    assert PeftTuner(AdapterConfig()).change(model) is None


@pytest.mark.parametrize("form", ["parallel", "sequential"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_weighted_sum_is_the_concatenation(form, dtype):
    """0.3 a + 0.7 b in one adapter of the hidden units of both, which need not be equally wide."""
    base = nn.ModuleDict({"f": nn.Linear(5, 3), "g": nn.Linear(5, 3)}).to(dtype)
    model = peft.get_peft_model(base, AdapterConfig(bottleneck=2, form=form, target_modules=["f", "g"]), "task_a")
    model.add_adapter("task_b", AdapterConfig(bottleneck=3, form=form, target_modules=["f"]))
    for key, p in model.named_parameters():
        if "perpetune" in key:
            nn.init.normal_(p)
    model.add_weighted_adapter(["task_a", "task_b"], [0.3, 0.7], "task_sum")
    assert not any(p.requires_grad for key, p in model.named_parameters() if "task_sum" in key)
    assert model.peft_config["task_sum"].bottleneck == 5
    x = torch.randn(6, 5, dtype=dtype)

    def change(layer, name):
        model.set_adapter(name)
        return layer(x) - layer.base_layer(x)

    f, g = model.base_model.model["f"], model.base_model.model["g"]
    tolerance = {"rtol": 0, "atol": 1e-12 if dtype == torch.float64 else 2e-6}
    torch.testing.assert_close(
        change(f, "task_sum"), 0.3 * change(f, "task_a") + 0.7 * change(f, "task_b"), **tolerance
    )
    torch.testing.assert_close(change(g, "task_sum"), 0.3 * change(g, "task_a"), **tolerance)


def test_weighted_sum_is_saved_and_loaded(families, outputs, tmp_path):
    from perpetune import load_adapter

    family = families["bert"]
    model = peft.get_peft_model(family.model(torch.bfloat16), AdapterConfig(bottleneck=2), "task_a")
    model.add_weighted_adapter(["task_a", "task_a"], [0.5, -2.0], "task_sum")
    model.set_adapter("task_sum")
    own = [p for key, p in model.named_parameters() if "task_sum" in key]
    assert {p.dtype for p in own} == {torch.float32}
    for p in own:
        nn.init.normal_(p)
    model.save_pretrained(tmp_path, selected_adapters=["task_sum"])
    loaded = load_adapter(family.model(torch.bfloat16), tmp_path / "task_sum")
    assert torch.equal(outputs(loaded, family.inputs()), outputs(model, family.inputs()))


def test_what_cannot_be_added_up(families):
    model = peft.get_peft_model(families["bert"].model(), AdapterConfig(bottleneck=2), "task_a")
    model.add_adapter("task_b", AdapterConfig(bottleneck=2, activation="relu"))
    model.add_adapter("task_c", AdapterConfig(bottleneck=2, modules_to_save=["pooler"]))
    for names, weights, new, message in (
        (["task_a"], [1.0, 2.0], "task_d", "one weight"),
        (["task_a", "task_x"], [1.0, 2.0], "task_d", "no adapter `task_x`"),
        (["task_a"], [1.0], "task_b", "choose another name"),
        (["task_a", "task_b"], [1.0, 1.0], "task_d", "differ"),
        (["task_a", "task_c"], [1.0, 1.0], "task_d", "modules_to_save"),
        (["task_a"], [1.0], "encoder", "task_0007"),
    ):
        with pytest.raises(ModelError, match=message):
            model.add_weighted_adapter(names, weights, new)
    assert list(model.peft_config) == ["task_a", "task_b", "task_c"]


@pytest.mark.parametrize("form", ["parallel", "sequential"])
def test_projection_keeps_old_outputs(families, outputs, train, form):
    """The rule knows nothing of adapters: it finds their two matrices. Without it, old outputs drift."""
    family = families["bert"]
    old, new = family.inputs(1, count=2), family.inputs(2)
    drift = {}
    for protect in (False, True):
        torch.manual_seed(0)
        model = PeftTuner(AdapterConfig(bottleneck=24, form=form)).attach(family.model(torch.float64)).double()
        train(model, old, 10)
        before = outputs(model, old)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.01)
        if protect:
            rule = SubspaceProjection(energy=1.0)
            rule.observe(model, lambda: [old])
            attach(model, optimizer, [rule], index=1)
        for _ in range(20):
            optimizer.zero_grad()
            model(**new).last_hidden_state.square().mean().backward()
            optimizer.step()
        drift[protect] = ((outputs(model, old) - before).norm() / before.norm()).item()
    assert drift[True] < 1e-12 and drift[False] > 1e-2


def test_what_a_learner_commits_loads_elsewhere(word_stream, tiny_bert, tmp_path):
    from transformers import AutoModel

    from perpetune import Learner, load_adapter, load_stream

    recipe = {"tuner": {"type": "AdapterConfig", "bottleneck": 4}}
    training = {"num_train_epochs": 1, "per_device_train_batch_size": 8, "learning_rate": 1e-2}
    folder = tiny_bert()
    learner = Learner(folder, recipe, tmp_path / "r", training=training)
    learner.learn(load_stream(word_stream, tasks=["films", "news"]))
    last = sorted((tmp_path / "r" / "commits").iterdir())[-1]
    loaded = load_adapter(AutoModel.from_pretrained(folder), last)
    own = {k: p for k, p in loaded.named_parameters() if "perpetune" in k}
    trained = dict(learner.backbone.model.named_parameters())
    assert len(own) == 8 and all(torch.equal(p, trained[k]) for k, p in own.items())
    assert any(p.any() for k, p in own.items() if "_up" in k)
