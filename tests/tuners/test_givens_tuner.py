"""GOFT, GOFT* and qGOFT: their equation, sizes, merging and several at once."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from perpetune.core.errors import ConfigError, ModelError
from perpetune.recipes.recipe import Recipe
from perpetune.tuners import GivensConfig, Multiplicative, PeftTuner, load_adapter
from perpetune.tuners.givens_rotations import dense, from_identity, strict_blocks

FORMS = ["strict", "norm", "quasi"]


def _shaken(model, scale=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for key, p in model.named_parameters():
        if "perpetune_givens" in key:
            p.data += scale * torch.randn(p.shape, generator=generator)
    return model


def _two(family, form, **settings):
    """A model with two shaken adapters, both active."""
    model = peft.get_peft_model(family.model(), GivensConfig(form=form, **settings), "task_0001")
    model.add_adapter("task_0002", GivensConfig(form=form, **settings))
    model.base_model.set_adapter(["task_0001", "task_0002"])
    return _shaken(model, 0.1)


def _layers(model):
    return [m for m in model.modules() if hasattr(m, "perpetune_givens_angles")]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make", [lambda: nn.Linear(24, 3), lambda: Conv1D(3, 24)])
def test_equation(make, form):
    """y = f(x R diag(c)) is f with the weight W diag(c) R^T, in fp64."""
    base = make().double()
    config = GivensConfig(target_modules=["f"], form=form)
    layer = peft.inject_adapter_in_model(config, nn.ModuleDict({"f": copy.deepcopy(base)}))["f"]
    x = torch.randn(2, 4, 24, dtype=torch.float64)
    assert torch.equal(layer(x), base(x))
    assert (layer.in_features, layer.out_features) == (24, 3)
    _shaken(layer.double())
    if form == "quasi":
        R = dense(from_identity(layer.perpetune_givens_block_change["default"]))
    else:
        R = dense(strict_blocks(layer.perpetune_givens_angles["default"]))
    c = 1 + layer.perpetune_givens_diagonal_change["default"] if form == "norm" else torch.ones(24)
    W = base.weight if isinstance(base, nn.Linear) else base.weight.T
    turned = W * c @ R.T
    torch.testing.assert_close(layer(x), x @ turned.T + base.bias, rtol=0, atol=1e-13)
    torch.testing.assert_close(layer.get_turned_weight("default", W), turned, rtol=0, atol=1e-13)
    assert torch.equal(layer.get_rotation("default"), R)


@pytest.mark.parametrize("form", FORMS)
def test_number_of_parameters(form):
    """d - 1, 2d - 1, 4(d - 1), whatever the layer puts out; the angles of all linear layers of DeBERTaV3-base."""
    block = {n: nn.Linear(768, 768, device="meta") for n in ("query", "key", "value", "dense")}
    block |= {"up": nn.Linear(768, 3072, device="meta"), "down": nn.Linear(3072, 768, device="meta")}
    model = nn.ModuleList(nn.ModuleDict(copy.deepcopy(block)) for _ in range(12))
    tuned = peft.get_peft_model(model, GivensConfig(form=form), low_cpu_mem_usage=True)
    trained = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    each = {"strict": lambda d: d - 1, "norm": lambda d: 2 * d - 1, "quasi": lambda d: 4 * (d - 1)}[form]
    assert trained == 12 * (5 * each(768) + each(3072))
    if form == "strict":
        assert trained == 82_872


@pytest.mark.parametrize("form", FORMS)
def test_what_rules_and_guarantees_find(families, form):
    """The penalty of qGOFT reads the columns alpha and beta of the blocks, orthogonality is measured on R."""
    model = _shaken(peft.get_peft_model(families["bert"].model(), GivensConfig(form=form), "task_0001"))
    for layer in _layers(model):
        kept = {
            "angles": layer.perpetune_givens_angles,
            "blocks": layer.perpetune_givens_block_change,
            "diagonal": layer.perpetune_givens_diagonal_change,
        }
        shapes = {k: tuple(v["task_0001"].shape) for k, v in kept.items() if "task_0001" in v}
        d = layer.get_base_layer().in_features
        wanted = {"strict": {"angles": (d - 1,)}, "norm": {"angles": (d - 1,), "diagonal": (d,)},
                  "quasi": {"blocks": (d - 1, 2, 2)}}[form]  # fmt: skip
        assert shapes == wanted
        R = layer.get_rotation("task_0001")
        assert R.dtype == torch.float64 and not R.requires_grad
        off = (R @ R.T - torch.eye(d)).abs().max()
        assert off > 0.1 if form == "quasi" else off < 1e-13


CASES = [(name, "strict") for name in ("bert", "vit", "llama", "gpt2")] + [("bert", "norm"), ("gpt2", "quasi")]


@pytest.mark.parametrize("name, form", CASES)
def test_trained_saved_and_loaded(families, outputs, train, name, form, tmp_path):
    family = families[name]
    base, inputs = family.model(), family.inputs()
    model = peft.get_peft_model(family.model(), GivensConfig(form=form), "task_0001")
    assert torch.equal(outputs(model, inputs), outputs(base, inputs))
    frozen = {k.replace(".base_layer", ""): p for k, p in model.get_base_model().named_parameters()}
    losses = train(model, inputs, steps=15)
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(frozen[k], p) and not frozen[k].requires_grad for k, p in base.named_parameters())
    linear = sum(isinstance(m, nn.Linear | Conv1D) for m in base.modules())
    assert len(_layers(model)) == linear
    expected = outputs(model, inputs)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(load_adapter(family.model(), tmp_path / "task_0001"), inputs), expected)
    again = peft.PeftModel.from_pretrained(family.model(), tmp_path / "task_0001")
    assert torch.equal(outputs(again, inputs), expected)


@pytest.mark.parametrize("form", FORMS)
def test_weight_decay_pulls_to_the_start(families, outputs, form):
    """Steps without a gradient leave the model as it is; blocks that decay to 0 shortened its rows by 4 %."""
    family = families["bert"]
    inputs, base = family.inputs(), outputs(family.model(), family.inputs())
    model = peft.get_peft_model(family.model(), GivensConfig(form=form))
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)  # as 2,000 of 1e-3 and 0.01
    for p in params:
        p.grad = torch.zeros_like(p)
    for _ in range(20):
        optimizer.step()
    assert torch.equal(outputs(model, inputs), base)
    _shaken(model, 0.1)
    shaken = (outputs(model, inputs) - base).norm()
    for _ in range(100):
        torch.optim.SGD(params, lr=0.1, weight_decay=1.0).step()
    assert (outputs(model, inputs) - base).norm() < 1e-3 * shaken


@pytest.mark.parametrize("form", FORMS)
def test_adapters_that_hold_the_blocks_themselves_are_opened(families, outputs, form, tmp_path):
    """As versions wrote them that trained g and c, and not their change since the start."""
    family = families["bert"]
    model = _shaken(peft.get_peft_model(family.model(), GivensConfig(form=form), "task_0001"), 0.1)
    expected = outputs(model, family.inputs())
    model.save_pretrained(tmp_path)
    file = tmp_path / "task_0001" / "adapter_model.safetensors"
    old = {}
    for key, value in load_file(file).items():
        start = torch.eye(2) if "block_change" in key else 1 if "diagonal_change" in key else 0
        old[key.replace("block_change", "blocks").replace("diagonal_change", "diagonal")] = value + start
    assert form == "strict" or old.keys() != load_file(file).keys()
    save_file(old, file)
    for load in (load_adapter, peft.PeftModel.from_pretrained):
        found = outputs(load(family.model(), tmp_path / "task_0001"), family.inputs())
        assert torch.equal(found, expected)
    tuner = PeftTuner(GivensConfig(form=form))
    again = tuner.attach(family.model())
    tuner.load(again, old)
    assert torch.equal(outputs(again, family.inputs()), expected)


@pytest.mark.parametrize("name, form", CASES)
def test_two_are_merged_in_reversed_order(families, outputs, name, form):
    """Tokens meet the first adapter first, so that in the weight it is the outermost."""
    family = families[name]
    inputs = family.inputs()
    base = outputs(family.model(), inputs)
    model = _two(family, form)
    both = outputs(model, inputs)
    before = {k: v.clone() for k, v in model.state_dict().items()}

    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(outputs(model, inputs), both, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.merge_adapter(["task_0001"])
    with pytest.warns(UserWarning, match="additionally merging"):
        model.merge_adapter(["task_0002"])
    torch.testing.assert_close(outputs(model, inputs), both, rtol=0, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(outputs(model, inputs), base)
    model.base_model.set_adapter(["task_0002", "task_0001"])
    other = outputs(model, inputs)
    assert (other - both).abs().max() > 1e-2
    merged = model.merge_and_unload()
    torch.testing.assert_close(outputs(merged, inputs), other, rtol=0, atol=1e-5)
    assert not any("perpetune" in k for k in merged.state_dict())


def test_one_task_after_another_is_the_later_one_first():
    """W_2 = (W_0 R_1^T) R_2^T, merged task by task, is both on top of W_0 with the second in front."""
    f = nn.Linear(24, 5, bias=False).double()
    W = f.weight.detach().clone()
    model = peft.get_peft_model(nn.ModuleDict({"f": f}), GivensConfig(target_modules=["f"]), "task_0001")
    model.add_adapter("task_0002", GivensConfig(target_modules=["f"]))
    (layer,) = _layers(_shaken(model.double()))
    for name in ("task_0001", "task_0002"):
        W = layer.get_turned_weight(name, W)
    model.base_model.set_adapter(["task_0002", "task_0001"])
    x = torch.randn(3, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ W.T, rtol=0, atol=1e-13)


def test_merged_and_unmerged_at_768():
    """The weights of unit variance of the sheet, with angles of 0.4."""
    torch.manual_seed(0)
    f = nn.Linear(768, 768)
    nn.init.normal_(f.weight)
    model = peft.get_peft_model(nn.ModuleDict({"f": f}), GivensConfig(target_modules=["f"]))
    (layer,) = _layers(_shaken(model, 0.4))
    x = torch.randn(8, 768)
    y = layer(x)
    layer.merge()
    assert (layer(x) - y).abs().max() <= 1e-6 * y.abs().max()


def test_many_tokens_turn_the_weight_where_no_gradient_is_wanted(monkeypatch):
    model = peft.get_peft_model(nn.ModuleDict({"f": nn.Linear(32, 4)}), GivensConfig(target_modules=["f"]))
    (layer,) = _layers(_shaken(model))
    x, turned = torch.randn(9, 32), []
    expected = layer(x)
    rotate_back = layer.get_turned_weight
    monkeypatch.setattr(layer, "get_turned_weight", lambda *args: turned.append(1) or rotate_back(*args))
    with torch.no_grad():
        layer(x)  # 9 tokens, 4 rows, but in training
        assert not turned
        torch.testing.assert_close(layer.eval()(x), expected, rtol=0, atol=1e-5)
        assert len(turned) == 1
        layer(x[:8])
    layer(x)
    assert len(turned) == 1


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_half_precision(families, outputs, train, name):
    """Rotated in fp32, rounded once; merged in fp32, rounded once; the stored weight comes back to the bit."""
    family = families[name]
    model = peft.get_peft_model(family.model(torch.bfloat16), GivensConfig(form="norm"), "task_0001")
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in family.inputs().items()}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    losses = train(model, inputs, steps=10)
    assert losses[-1] < losses[0]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    layer = _layers(model)[0]
    W = layer._weight().clone()
    model.merge_adapter()
    assert torch.equal(layer._weight(), layer.get_turned_weight("task_0001", W.float()).bfloat16())
    assert outputs(model, inputs).dtype == torch.bfloat16
    model.unmerge_adapter()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_rotations_are_not_rounded_under_autocast():
    model = peft.get_peft_model(nn.ModuleDict({"f": nn.Linear(32, 32)}), GivensConfig(target_modules=["f"]))
    (layer,) = _layers(_shaken(model))
    seen = []
    layer.base_layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.randn(5, 32)
    y = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = layer(x)
    assert torch.equal(*seen) and low.dtype == torch.bfloat16 and y.dtype == torch.float32


def _gradients(model, run):
    model.zero_grad()
    run().square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


def test_gradient_checkpointing(families):
    family = families["llama"]
    model = _shaken(peft.get_peft_model(family.model(), GivensConfig(radix=8))).train()
    plain = _gradients(model, lambda: model(**family.inputs()).last_hidden_state)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    again = _gradients(model, lambda: model(**family.inputs()).last_hidden_state)
    for one, two in zip(plain, again, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5)


def test_compilation():
    model = peft.get_peft_model(nn.ModuleDict({"f": nn.Linear(32, 4)}), GivensConfig(target_modules=["f"], radix=8))
    (layer,) = _layers(_shaken(model))
    x = torch.randn(2, 3, 32)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for one, two in zip(_gradients(model, lambda: layer(x)), _gradients(model, lambda: compiled(x)), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5)


def test_safe_merge_refuses_what_is_not_finite():
    f = nn.Linear(8, 2)
    model = peft.get_peft_model(nn.ModuleDict({"f": f}), GivensConfig(target_modules=["f"]), "task_0001")
    before = f.weight.detach().clone()
    nn.init.constant_(next(p for k, p in model.named_parameters() if "perpetune" in k), float("inf"))
    with pytest.raises(ModelError, match="task_0001 is broken"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(f.weight, before)


def test_layers_are_counted_where_no_targets_are_named(families):
    for targets in (None, "all-linear"):
        config = GivensConfig(target_modules=targets, layers_to_transform=1, exclude_modules=["attention.output.dense"])
        model = peft.get_peft_model(families["bert"].model(), config)
        keys = [k for k, m in model.named_modules() if hasattr(m, "perpetune_givens_angles")]
        assert len(keys) == 5 and all(".layer.1." in k and "attention.output" not in k for k in keys)


@pytest.mark.parametrize("settings", [{"form": "loose"}, {"radix": 24}, {"radix": 0}, {"radix": "32"}])
def test_settings_that_cannot_be(settings):
    with pytest.raises(ConfigError, match=f"`{next(iter(settings))}`"):
        GivensConfig(**settings)


def test_what_cannot_be_rotated_or_added_up(families):
    with pytest.raises(ModelError, match="`conv` is a Conv2d"):
        peft.get_peft_model(nn.ModuleDict({"conv": nn.Conv2d(2, 2, 1)}), GivensConfig(target_modules=["conv"]))
    model = _two(families["bert"], "strict")
    with pytest.raises(ModelError, match="merge them one after the other"):
        model.add_weighted_adapter(["task_0001", "task_0002"], [0.5, 0.5], "mean")
    tuner = PeftTuner(GivensConfig())
    assert isinstance(tuner.change(tuner.attach(families["bert"].model())), Multiplicative)


def test_a_recipe_in_plain_data():
    data = {"type": "GivensConfig", "form": "quasi"}
    assert Recipe.from_dict({"tuner": data}).to_dict()["tuner"] == data
