"""What every tuner of ours must do as a peft tuner, and how peft comes to know it."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

import perpetune
from perpetune.core.errors import ConfigError, ModelError
from perpetune.recipes.recipe import Recipe
from perpetune.rules.linear_sites import linear_sites
from perpetune.tuners import OWN_CONFIGS, AdapterConfig, BiasConfig, GivensConfig, PeftTuner, load_adapter
from perpetune.tuners.peft_plugin import OwnConfig, check_adapter_name, register

OWN = {
    "parallel": lambda **k: AdapterConfig(**{"bottleneck": 4, **k}),
    "sequential": lambda **k: AdapterConfig(**{"bottleneck": 4, "form": "sequential", **k}),
    "bias": BiasConfig,
    "givens": lambda **k: GivensConfig(**{"form": "quasi", **k}),
}


@pytest.fixture(params=OWN)
def config(request):
    """`config(**settings)` of every tuner in turn."""
    return OWN[request.param]


def _trained(config, family, train, name="task_0001", seed=0, steps=3, **settings):
    torch.manual_seed(seed)
    model = peft.get_peft_model(family.model(), config(**settings), adapter_name=name)
    train(model, family.inputs(seed), steps)
    return model


def _shake(model: Any, name: str, seed: int) -> None:
    """Other weights for one adapter, whether it is frozen or not."""
    generator = torch.Generator().manual_seed(seed)
    for key, p in model.named_parameters():
        if f".{name}" in key:
            p.data += 0.1 * torch.randn(p.shape, generator=generator)


def test_identity_at_start_and_only_the_tuner_trains(config, family, outputs, train):
    base, inputs = family.model(), family.inputs()
    model = peft.get_peft_model(family.model(), config(), adapter_name="task_0001")
    assert torch.equal(outputs(model, inputs), outputs(base, inputs))
    losses = train(model, inputs, steps=12, lr=3e-2)
    assert losses[-1] < 0.5 * losses[0]
    after = {k.replace(".base_layer", ""): v for k, v in model.get_base_model().named_parameters()}
    frozen = dict(base.named_parameters())
    assert all(torch.equal(after[k], v) and not after[k].requires_grad for k, v in frozen.items())
    assert {k.split("perpetune_")[1].split("_")[0] for k in after.keys() - frozen.keys()} <= {
        "adapter",
        "bias",
        "givens",
    }


def test_saved_and_loaded_to_the_bit(config, family, outputs, train, tmp_path):
    model, inputs = _trained(config, family, train), family.inputs()
    expected = outputs(model, inputs)
    model.save_pretrained(tmp_path)
    folder = tmp_path / "task_0001"
    trained = sum(p.requires_grad for p in model.parameters())
    assert len(load_file(folder / "adapter_model.safetensors")) == trained > 0
    for settings in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True}, {"adapter_name": "another"}):
        loaded = load_adapter(family.model(), folder, **settings)
        assert torch.equal(outputs(loaded, inputs), expected)
        assert sum(p.requires_grad for p in loaded.parameters()) == (trained if "is_trainable" in settings else 0)


def test_what_is_kept_beside_adapters_is_not_saved(config, families, train, tmp_path):
    model = _trained(config, families["bert"], train)
    layer = next(m for m in model.modules() if hasattr(m, "adapter_layer_names"))
    layer.register_buffer("derived", torch.ones(1), persistent=False)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "task_0001" / "adapter_model.safetensors")
    assert {k.split("perpetune_")[1] for k in stored} <= {
        "adapter_down.weight",
        "adapter_up.weight",
        "bias_db",
        "givens_block_change",
    }


def test_several_adapters(config, family, outputs, train, tmp_path):
    inputs = family.inputs()
    base = outputs(family.model(), inputs)
    model = _trained(config, family, train, "task_0001")
    first = outputs(model, inputs)

    torch.manual_seed(7)
    model.add_adapter("task_0002", config())
    assert not any(p.requires_grad for k, p in model.named_parameters() if ".task_0002" in k)
    assert torch.equal(outputs(model, inputs), first)
    _shake(model, "task_0002", 1)
    model.set_adapter("task_0002")
    second = outputs(model, inputs)
    assert all(p.requires_grad == (".task_0002" in k) for k, p in model.named_parameters())
    model.base_model.set_adapter(["task_0001", "task_0002"])
    both = outputs(model, inputs)
    assert min((a - b).abs().max() for a, b in ((first, second), (first, both), (second, both), (first, base))) > 1e-3

    model.save_pretrained(tmp_path, selected_adapters=["task_0002"])
    assert not (tmp_path / "task_0001").exists()
    assert torch.equal(outputs(load_adapter(family.model(), tmp_path / "task_0002"), inputs), second)
    with model.disable_adapter():
        assert torch.equal(outputs(model, inputs), base)
    model.set_adapter("task_0001")
    assert torch.equal(outputs(model, inputs), first)
    model.delete_adapter("task_0002")
    assert torch.equal(outputs(model, inputs), first) and list(model.peft_config) == ["task_0001"]
    model.load_adapter(tmp_path / "task_0002", "task_0002")
    model.base_model.set_adapter(["task_0001", "task_0002"])
    assert torch.equal(outputs(model, inputs), both)
    assert torch.equal(outputs(model.unload(), inputs), base)


def test_injected_into_a_plain_model(config, families, outputs, train):
    family = families["bert"]
    source, inputs = _trained(config, family, train), family.inputs()
    target = peft.inject_adapter_in_model(config(), family.model(), adapter_name="task_0009")
    result: Any = set_peft_model_state_dict(
        target, get_peft_model_state_dict(source, adapter_name="task_0001"), adapter_name="task_0009"
    )
    assert not result.unexpected_keys
    assert torch.equal(outputs(target, inputs), outputs(source, inputs))


def test_all_linear_with_two_adapters(config, family):
    model = peft.get_peft_model(family.model(), config(target_modules="all-linear"), adapter_name="task_0001")
    model.add_adapter("task_0002", config(target_modules="all-linear"))
    layers = [m for m in model.modules() if hasattr(m, "adapter_layer_names")]
    linear = sum(type(m).__name__ in ("Linear", "Conv1D") for m in family.model().modules())
    assert len(layers) == linear
    assert all(m._get_available_adapters() == {"task_0001", "task_0002"} for m in layers)


def test_half_precision_base_has_adapters_in_fp32(config, family, outputs, train, tmp_path):
    model = peft.get_peft_model(family.model(torch.bfloat16), config(), adapter_name="task_0001")
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in family.inputs().items()}
    own = [p for p in model.parameters() if p.requires_grad]
    assert own and {p.dtype for p in own} == {torch.float32}
    losses = train(model, inputs, steps=5)
    assert losses[-1] < losses[0]
    got = outputs(model, inputs)
    assert got.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(load_adapter(family.model(torch.bfloat16), tmp_path / "task_0001"), inputs), got)


def test_configurations_survive_copies_and_json(config, tmp_path):
    made = config(target_modules=["dense"], layers_to_transform=[0, 1], modules_to_save=["head"])
    assert pickle.loads(pickle.dumps(made)) == copy.deepcopy(made) == made
    made.save_pretrained(tmp_path)
    assert peft.PeftConfig.from_pretrained(tmp_path) == made
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "from_the_future": 1}))
    with pytest.warns(UserWarning, match="from_the_future"):
        assert peft.PeftConfig.from_pretrained(tmp_path) == made


def test_layers_and_exclusions_are_kept_to(config, families):
    made = config(layers_to_transform=1, exclude_modules=["attention.output.dense"])
    model = peft.get_peft_model(families["bert"].model(), made)
    keys = [k for k, m in model.named_modules() if hasattr(m, "adapter_layer_names")]
    assert any(k.endswith(".layer.1.output.dense") for k in keys)
    assert all(".layer.1." in k and not k.endswith("attention.output.dense") for k in keys)


@pytest.mark.parametrize("settings", [{"target_modules": ".*dense", "layers_to_transform": 0}, {"layers_pattern": "h"}])
def test_contradicting_fields_are_refused(config, settings):
    with pytest.raises(ConfigError, match="layers_to_transform"):
        config(**settings)


def test_number_of_protected_weights_also_under_ddp(families):
    """Every trained tensor is seen as a linear map, and none is missed by its name in a wrapper."""
    counts = {"parallel": 2 * 2 * 2, "sequential": 2 * 2 * 2, "bias": 2 * 8 + 2}  # BERT: 2 layers, embeddings, pooler
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        for kind, count in counts.items():
            model = peft.get_peft_model(families["bert"].model(), OWN[kind](), adapter_name="task_0001")
            for wrapped in (model, nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)):
                sites, others = linear_sites(wrapped)
                assert len(sites) == count and not others
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["0", "encoder", "weight", "model", "base_layer", "perpetune_bias_db"])
def test_names_under_which_tensors_would_be_lost_are_refused(config, families, name):
    family = families["bert"]
    with pytest.raises(ModelError, match="task_0007"):
        peft.get_peft_model(family.model(), config(), adapter_name=name)
    model = peft.get_peft_model(family.model(), config(), adapter_name="task_0001")
    with pytest.raises(ModelError, match="task_0007"):
        model.add_adapter(name, config())
    assert list(model.peft_config) == ["task_0001"]
    model.add_adapter("task_0002", config())


def test_a_part_called_as_the_tuners_adapter_is_refused_for_every_peft_configuration():
    model = nn.ModuleDict({"default": nn.Linear(2, 2)})
    with pytest.raises(ModelError, match="`default`"):
        PeftTuner(peft.LoraConfig(target_modules=["default"])).attach(model)
    check_adapter_name(model, "task_0007")


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_a_truncated_checkpoint_is_not_loaded(families, train, tmp_path):
    """The trap itself, with stock LoRA: saved under the name of a part, the other adapter loses its tensors."""
    family = families["bert"]
    lora = peft.LoraConfig(r=2, target_modules=["query"])
    model = peft.get_peft_model(family.model(), lora, adapter_name="encoder")
    model.add_adapter("other", lora)
    model.add_adapter("0", lora)
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="lacks [1-9]"):
        load_adapter(family.model(), tmp_path / "other")
    with pytest.raises(ModelError, match="use a name such as"):
        load_adapter(family.model(), tmp_path / "0", adapter_name="0")


def test_peft_s_own_adapters_load_as_well(families, outputs, train, tmp_path):
    configs = {
        "lora": peft.LoraConfig(r=2, target_modules=["query"], use_dora=True, modules_to_save=["pooler"]),
        "ia3": peft.IA3Config(target_modules=["key"], feedforward_modules=[]),
        "vblora": peft.VBLoRAConfig(r=2, target_modules=["query", "key"], vector_length=8, num_vectors=8, topk=2),
    }
    family = families["bert"]
    for name, config in configs.items():
        model, inputs = peft.get_peft_model(family.model(), config), family.inputs()
        train(model, inputs, 2)
        model.save_pretrained(tmp_path / name)
        assert torch.equal(outputs(load_adapter(family.model(), tmp_path / name), inputs), outputs(model, inputs))


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_misfits_are_named(families, train, tmp_path):
    family = families["bert"]
    model = _trained(OWN["bias"], family, train, "default")
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    whole = load_file(file)
    first = sorted(whole)[0]
    save_file({k: v for k, v in whole.items() if k != first}, file)
    with pytest.raises(ModelError, match=r"lacks 1 tensors .*perpetune_bias_db\.default"):
        load_adapter(family.model(), tmp_path)
    save_file({**whole, "base_model.model.nowhere.perpetune_bias_db": torch.ones(1)}, file)
    with pytest.raises(ModelError, match="has 1 that this model has no place for .*nowhere"):
        load_adapter(family.model(), tmp_path)
    with pytest.raises(ModelError, match="cannot load the adapter"):
        load_adapter(families["gpt2"].model(), tmp_path)
    with pytest.raises(ModelError, match="cannot load the adapter"):
        load_adapter(family.model(), tmp_path / "nothing")


def test_another_peft_is_told_apart(monkeypatch):
    register("perpetune_bias", BiasConfig, peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING["perpetune_bias"])
    monkeypatch.delattr(peft.mapping, "PEFT_TYPE_TO_PREFIX_MAPPING")
    with pytest.raises(ModelError, match="PEFT_TYPE_TO_PREFIX_MAPPING"):
        register("perpetune_bias", BiasConfig, peft.tuners.tuners_utils.BaseTuner)


def _go_on(model, family, file):
    import torch
    from safetensors.torch import save_file

    own = {k: p for k, p in model.eval().named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(own.values(), lr=0.1)
    for seed in range(3):
        optimizer.zero_grad()
        model(**family.inputs(seed)).last_hidden_state.square().mean().backward()
        optimizer.step()
    save_file({k: p.detach().clone() for k, p in own.items()}, file)


RESUME = """
import sys
sys.path[:0] = {path!r}
known = {{name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "peft"}}
import perpetune.tuners
assert known and "peft" not in sys.modules
sys.modules.update(known)
import peft, torch
from conftest import FAMILIES
torch.set_num_threads(1)
family = FAMILIES["bert"]
try:
    peft.PeftModel.from_pretrained(family.model(), {folder!r})
except KeyError as error:
    print("KeyError", error)
model = perpetune.load_adapter(family.model(), {folder!r}, adapter_name="task_0001", is_trainable=True)
_go_on(model, family, {file!r})
"""


def test_training_goes_on_in_a_new_process_with_the_same_bits(families, train, elsewhere, tmp_path):
    """There peft alone does not know the tuner, and importing our tuners does not import peft."""
    family = families["bert"]
    model = _trained(OWN["parallel"], family, train)
    model.save_pretrained(tmp_path)
    here, there = str(tmp_path / "here"), str(tmp_path / "there")
    path = [str(Path(__file__).parent), str(Path(perpetune.__file__).parents[1])]
    code = inspect.getsource(_go_on) + RESUME.format(path=path, folder=str(tmp_path / "task_0001"), file=there)
    assert "KeyError 'perpetune_adapter'" in elsewhere(code)
    _go_on(model, family, here)
    one, other = load_file(here), load_file(there)
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize(
    "data", [{"type": "AdapterConfig", "bottleneck": 8, "form": "sequential"}, {"type": "BiasConfig"}]
)
def test_a_recipe_in_plain_data(data):
    recipe = Recipe.from_dict({"tuner": data})
    assert recipe.to_dict()["tuner"] == data
    assert type(recipe.tuner.config).__name__ == data["type"]
    again = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert again.to_dict() == recipe.to_dict()


def test_a_recipe_names_what_there_is():
    with pytest.raises(ConfigError, match="did you mean .*`AdapterConfig`"):
        Recipe.from_dict({"tuner": "AdaptrConfig"})
    with pytest.raises(ConfigError, match="`bottleneck`"):
        Recipe.from_dict({"tuner": {"type": "AdapterConfig", "bottlneck": 8}})
    with pytest.raises(ConfigError, match="`bottleneck` = 'wide'"):
        Recipe.from_dict({"tuner": {"type": "AdapterConfig", "bottleneck": "wide"}})
    assert issubclass(perpetune.AdapterConfig, OwnConfig) and set(OWN_CONFIGS) <= set(dir(perpetune))
