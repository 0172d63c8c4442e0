"""A commit's adapter goes where it was trained, in models that have a pooler, and in those that have none."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

from perpetune.core.errors import ModelError
from perpetune.tuners import AdapterConfig, BiasConfig, GivensConfig, PeftTuner, PrefixConfig, load_adapter

# 4 layers with 6 linear layers each: from 20 on peft shortens the names of what it found
SIZE = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 9}
CONFIGS = {
    "lora": peft.LoraConfig(r=2, target_modules="all-linear"),
    "lora of dense": peft.LoraConfig(r=2, target_modules=["dense"]),
    "lora by an expression": peft.LoraConfig(r=2, target_modules=r".*\.dense"),
    "lora of one layer": peft.LoraConfig(r=2, target_modules=["dense"], layers_to_transform=[1]),
    "oft": peft.OFTConfig(oft_block_size=4, target_modules="all-linear"),
    "givens": GivensConfig(form="strict", target_modules="all-linear"),
    "bias": BiasConfig(),
    "adapter": AdapterConfig(bottleneck=2),
    "prefix": PrefixConfig(num_virtual_tokens=2),
    "ia3": peft.IA3Config(target_modules=["key", "output.dense"], feedforward_modules=["output.dense"]),
}
INPUTS = {"input_ids": torch.arange(9)[None]}


def base(pooler):
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SIZE, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    state = model.state_dict()
    if pooler:
        return model.eval()
    model = BertModel(model.config, add_pooling_layer=False).eval()
    model.load_state_dict({k: v for k, v in state.items() if "pooler" not in k})
    return model


def committed(config, folder, pooler=False):
    """What a commit stores of a tuned model, and what the model says."""
    tuner = PeftTuner(config)
    model = tuner.attach(base(pooler))
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=generator)
    files = tuner.files(model)
    save_file(files["adapter_model.safetensors"], folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(files["adapter_config.json"]))
    with torch.no_grad():
        return files["adapter_config.json"], model.eval()(**INPUTS).last_hidden_state


@pytest.mark.parametrize("name", CONFIGS)
def test_with_and_without_a_pooler(name, tmp_path):
    settings, expected = committed(CONFIGS[name], tmp_path)
    assert not any("pooler" in target for target in settings["target_modules"])
    own = name in ("givens", "bias", "adapter", "prefix")
    for pooler in (True, False):
        for load in (load_adapter, *(() if own else (peft.PeftModel.from_pretrained,))):
            with torch.no_grad():
                assert torch.equal(load(base(pooler), tmp_path).eval()(**INPUTS).last_hidden_state, expected)


def test_what_was_asked_for_stays_as_it_is():
    """run.yaml holds the tuner's own configuration: the whole names are of the files alone."""
    tuner = PeftTuner(peft.LoraConfig(r=2, target_modules="all-linear"))
    tuner.files(tuner.attach(base(False)))
    assert tuner.config.target_modules == "all-linear"


def test_whole_names_that_would_fit_more_are_not_written():
    """The list [`dense`] would also fit `inner.dense`, which the expression leaves out."""
    model = torch.nn.ModuleDict({"dense": torch.nn.Linear(4, 4), "inner": torch.nn.ModuleDict()})
    model["inner"]["dense"] = torch.nn.Linear(4, 4)
    tuner = PeftTuner(peft.LoraConfig(r=2, target_modules="dense"))
    files = tuner.files(tuner.attach(model))
    assert files["adapter_config.json"]["target_modules"] == "dense"
    assert not any("inner" in key for key in files["adapter_model.safetensors"])


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize("pooler", [True, False])
def test_a_misfit_in_the_pooler_is_called_so(tmp_path, pooler):
    """An adapter that names ends only, as peft itself saves them."""
    committed(peft.LoraConfig(r=2, target_modules=["dense"]), tmp_path, pooler=pooler)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "target_modules": ["dense"]}))
    with pytest.raises(ModelError, match=f"pooler: load the model so .add_pooling_layer={pooler}"):
        load_adapter(base(not pooler), tmp_path)


def test_a_tuner_that_nobody_registered(tmp_path):
    settings, _ = committed(BiasConfig(), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "peft_type": "perpetune_unheard_of"}))
    with pytest.raises(ModelError, match="no tuner 'perpetune_unheard_of' is registered with peft: import"):
        load_adapter(base(False), tmp_path)
