"""BitFit: its equation, what it targets, merging, and how it is offered to the projection rule."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from perpetune.core.errors import ModelError, RuleError
from perpetune.recipes.recipe import Recipe
from perpetune.rules import SubspaceProjection, attach
from perpetune.tuners import Additive, BiasConfig, PeftTuner


def _shaken(model, scale=0.1):
    for key, p in model.named_parameters():
        if "perpetune_bias_db" in key:
            nn.init.normal_(p, std=scale)
    return model


@pytest.mark.parametrize("make", [lambda: nn.Linear(5, 3), lambda: nn.LayerNorm(5), lambda: Conv1D(3, 5)])
def test_equation(make):
    """y = f(x) + db is f with the bias b + db, in fp64."""
    base = make().double()
    nn.init.normal_(base.bias)
    model = peft.inject_adapter_in_model(BiasConfig(target_modules=["f"]), nn.ModuleDict({"f": base}))
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    before = base(x)
    assert torch.equal(model["f"](x), before)
    _shaken(model.double())
    db = model["f"].perpetune_bias_db["default"].detach()
    assert db.shape == base.bias.shape
    torch.testing.assert_close(model["f"](x), before + db, rtol=0, atol=1e-15)
    shifted = make().double()
    shifted.load_state_dict({"weight": base.weight, "bias": base.bias + db})
    torch.testing.assert_close(model["f"](x), shifted(x), rtol=0, atol=1e-14)


def test_every_bias_of_linear_and_norm_layers_is_found_and_no_other(family):
    base = family.model()
    model = PeftTuner(BiasConfig()).attach(family.model())
    here = {k for k, m in model.get_base_model().named_modules() if hasattr(m, "perpetune_bias_db")}
    there = {
        k
        for k, m in base.named_modules()
        if getattr(m, "bias", None) is not None and type(m).__name__ in ("Linear", "LayerNorm", "Conv1D")
    }
    assert here == there and len(here) >= 13


def test_what_has_no_such_bias():
    bare = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "conv": nn.Conv2d(2, 2, 1), "b": nn.Linear(2, 2)})
    tuned = PeftTuner(BiasConfig(target_modules=["a", "b"])).attach(bare)  # the one without is passed over
    assert [k for k, _ in tuned.named_parameters() if "perpetune" in k] == [
        "base_model.model.b.perpetune_bias_db.default"
    ]
    with pytest.raises(ModelError, match="none of the targeted"):
        PeftTuner(BiasConfig(target_modules=["a"])).attach(nn.ModuleDict({"a": nn.Linear(2, 2, bias=False)}))
    with pytest.raises(ModelError, match="no layer with a bias"):
        PeftTuner(BiasConfig()).attach(nn.ModuleDict({"a": nn.Linear(2, 2, bias=False)}))
    with pytest.raises(ModelError, match="last dimension"):
        PeftTuner(BiasConfig(target_modules=["conv"])).attach(nn.ModuleDict({"conv": nn.Conv2d(2, 2, 1)}))


def test_parts_that_are_never_called_are_left_out():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "out": nn.Linear(4, 4)})
    tuned = PeftTuner(BiasConfig()).attach(model)
    assert [k for k, m in tuned.named_modules() if hasattr(m, "perpetune_bias_db")] == ["base_model.model.out"]
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "out": nn.Linear(4, 4)})
    with pytest.raises(ModelError, match=r"`attention\.out_proj` may never be called"):
        PeftTuner(BiasConfig(target_modules=["out_proj"])).attach(model)


def test_merging_and_unmerging(family, outputs):
    inputs = family.inputs()
    base = outputs(family.model(), inputs)
    model = _shaken(peft.get_peft_model(family.model(), BiasConfig(), "task_0001"))
    model.add_adapter("task_0002", BiasConfig())
    _shaken(model)
    model.base_model.set_adapter(["task_0001", "task_0002"])
    both = outputs(model, inputs)
    before = {k: v.clone() for k, v in model.state_dict().items()}

    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(outputs(model, inputs), both, rtol=0, atol=2e-5)
    model.unmerge_adapter()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.merge_adapter(["task_0001"])
    with pytest.warns(UserWarning, match="additionally merging"):
        model.merge_adapter(["task_0002"])
    torch.testing.assert_close(outputs(model, inputs), both, rtol=0, atol=2e-5)
    with model.disable_adapter():
        assert torch.equal(outputs(model, inputs), base)
    merged = model.merge_and_unload()
    torch.testing.assert_close(outputs(merged, inputs), both, rtol=0, atol=2e-5)
    assert not any("perpetune" in k for k in merged.state_dict())


def test_merged_in_fp32_and_rounded_once():
    """Two changes of 3/8 of a step of bf16 are 3/4 of one: added one after the other, both would be lost."""
    f = nn.Linear(1, 1).bfloat16()
    nn.init.ones_(f.bias)
    model = peft.get_peft_model(nn.ModuleDict({"f": f}), BiasConfig(), "task_0001")
    model.add_adapter("task_0002", BiasConfig())
    for p in (p for k, p in model.named_parameters() if "perpetune" in k):
        nn.init.constant_(p, 3 / 8 * 2**-7)
    model.merge_adapter(["task_0001"])
    assert f.bias.item() == 1
    with pytest.warns(UserWarning, match="additionally merging"):
        model.merge_adapter(["task_0002"])
    assert f.bias.item() == 1 + 2**-7
    model.unmerge_adapter()
    assert f.bias.item() == 1


def test_safe_merge_refuses_what_is_not_finite():
    f = nn.Linear(1, 1)
    model = peft.get_peft_model(nn.ModuleDict({"f": f}), BiasConfig(), "task_0001")
    before = f.bias.item()
    nn.init.constant_(next(p for k, p in model.named_parameters() if "perpetune" in k), float("inf"))
    with pytest.raises(ModelError, match="task_0001 is broken"):
        model.merge_adapter(safe_merge=True)
    assert f.bias.item() == before


def test_the_change_is_a_sum_that_the_tuner_hands_out(family, outputs):
    inputs = family.inputs()
    tuner = PeftTuner(BiasConfig())
    model = _shaken(tuner.attach(family.model()))
    change = tuner.change(model)
    assert isinstance(change, Additive)
    deltas = change.deltas()
    assert deltas and all(k.endswith(".bias") for k in deltas)
    rebuilt = family.model()
    parameters = dict(rebuilt.named_parameters())
    with torch.no_grad():
        for key, delta in deltas.items():
            parameters[key] += delta
    torch.testing.assert_close(outputs(rebuilt, inputs), outputs(model, inputs), rtol=0, atol=2e-5)
    assert torch.equal(outputs(tuner.detach(model), inputs), outputs(family.model(), inputs))


def test_offered_as_a_map_of_the_constant_1(families):
    model = _shaken(PeftTuner(BiasConfig(target_modules=["query"])).attach(families["bert"].model()))
    layer = next(m for m in model.modules() if hasattr(m, "linear_maps"))
    (site,) = layer.linear_maps("per_head")
    W = site.matrix(site.weight)
    assert (site.name, W.shape, site.width) == ("bias", (32, 1), 1)
    assert W.data_ptr() == site.weight.data_ptr()  # a view
    seen = []
    model(**families["bert"].inputs())
    handle = site.modules[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(**families["bert"].inputs())
    handle.remove()
    model(**families["bert"].inputs())
    (x,) = seen
    assert x.shape == (4, 6, 1) and (x == 1).all()
    torch.testing.assert_close(x @ W.T, site.weight.expand(4, 6, 32))

    model.add_adapter("task_0002", BiasConfig(target_modules=["query"]))
    assert [m.weight for m in layer.linear_maps("published")] == [site.weight]
    model.base_model.set_adapter(["default", "task_0002"])
    with pytest.raises(RuleError, match="at once"):
        layer.linear_maps("per_head")
    with model.disable_adapter():
        assert layer.linear_maps("per_head") == []


def test_projection_freezes_biases_after_the_first_task(families, train):
    """The space of the constant 1 is full after one token."""
    family = families["bert"]
    model = PeftTuner(BiasConfig()).attach(family.model())
    train(model, family.inputs(1), 5)
    own = {k: p for k, p in model.named_parameters() if p.requires_grad}
    before = {k: p.detach().clone() for k, p in own.items()}
    rule, optimizer = SubspaceProjection(energy=1.0), torch.optim.AdamW(own.values(), lr=1e-2, weight_decay=0.01)
    rule.observe(model, lambda: [family.inputs(1)])
    attach(model, optimizer, [rule], index=1)
    model(**family.inputs(2)).last_hidden_state.square().mean().backward()
    optimizer.step()
    assert all((p - before[k]).abs().max() < 1e-7 for k, p in own.items())


def test_a_learner_merges_it(word_stream, tiny_bert, tmp_path):
    from perpetune import Learner, load_stream

    recipe = Recipe.from_dict({"tuner": "BiasConfig", "consolidation": "Merge"})
    training = {"num_train_epochs": 1, "per_device_train_batch_size": 8, "learning_rate": 1e-2}
    stream = load_stream(word_stream, tasks=["films", "news"])
    result = Learner(tiny_bert(), recipe, tmp_path / "r", training=training).learn(stream)
    merged = [g for g in result.guarantees if g["source"] == "Merge"]
    assert merged and all(g["holds"] for g in merged)
