"""What a tuner does to the weights is asked of its layers; initialisations that change the base are refused."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn

import perpetune as pt
from perpetune.tuners import Additive, AllWeights, Frozen, Multiplicative, PeftTuner

D = 16


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, D)

    def forward(self, x):
        return self.two(self.norm(torch.relu(self.one(x))))


def lora(**settings):
    return peft.LoraConfig(r=4, target_modules=["one", "two"], **settings)


TARGETS = {"target_modules": ["one", "two"]}
SUMS = {
    "LoRA": lambda: lora(),
    "rsLoRA": lambda: lora(use_rslora=True, rank_pattern={"one": 2}),
    "LoHa": lambda: peft.LoHaConfig(r=2, **TARGETS),
    "LoKr": lambda: peft.LoKrConfig(r=2, **TARGETS),
    "VeRA": lambda: peft.VeraConfig(r=4, **TARGETS),
    "FourierFT": lambda: peft.FourierFTConfig(n_frequency=10, **TARGETS),
    "biases": lambda: pt.BiasConfig(),
}
PRODUCTS = {
    "OFT": lambda: peft.OFTConfig(oft_block_size=4, **TARGETS),
    "Givens": lambda: pt.GivensConfig(**TARGETS),
}
NEITHER = {  # several have a get_delta_weight
    "DoRA": lambda: lora(use_dora=True),
    "LoRA with biases of its own": lambda: lora(lora_bias=True),
    "LoRA beside trained biases": lambda: lora(bias="all"),
    "LoRA beside a trained module": lambda: lora(modules_to_save=["norm"]),
    "HRA": lambda: peft.HRAConfig(r=2, **TARGETS),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=4, **TARGETS),
    "MiSS": lambda: peft.MissConfig(r=4, **TARGETS),
    "IA3": lambda: peft.IA3Config(feedforward_modules=[], **TARGETS),
    "LayerNorm": lambda: peft.LNTuningConfig(target_modules=["norm"]),
    "adapter": lambda: pt.AdapterConfig(bottleneck=2, **TARGETS),
}


def attached(config):
    """A tuner and a model that carries it, its parameters not those of the start."""
    torch.manual_seed(0)
    tuner = PeftTuner(config)
    model = tuner.attach(Net())
    for p in (p for p in model.parameters() if p.requires_grad):
        p.data += 0.1 * torch.randn_like(p)
    return tuner, model


def weights_of(model):
    return {n.replace(".base_layer.", "."): p for n, p in model.get_base_model().named_parameters()}


@pytest.mark.parametrize("make", SUMS.values(), ids=SUMS.keys())
def test_a_sum_is_what_merging_adds(make):
    tuner, model = attached(make())
    change = tuner.change(model)
    assert isinstance(change, Additive) and not tuner.rotates
    deltas = change.deltas()
    before = {n: p.detach().clone() for n, p in weights_of(model).items() if n in deltas}
    merged = dict(model.merge_and_unload().named_parameters())
    assert before.keys() == deltas.keys() and any(delta.abs().max() > 1e-3 for delta in deltas.values())
    for name, delta in deltas.items():
        torch.testing.assert_close(merged[name], before[name] + delta, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", PRODUCTS.values(), ids=PRODUCTS.keys())
def test_a_product_turns_any_weight(make):
    tuner, model = attached(make())
    change = tuner.change(model)
    assert isinstance(change, Multiplicative) and tuner.rotates
    zero = {name: torch.zeros(D, D) for name in change.turn({})}
    assert zero and all(not turned.any() for turned in change.turn(zero).values())
    merged = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
    for name, turned in change.turn({}).items():
        torch.testing.assert_close(merged[name], turned, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", NEITHER.values(), ids=NEITHER.keys())
def test_what_is_neither_is_not_taken_for_a_sum(make):
    tuner, model = attached(make())
    assert tuner.change(model) is None and not tuner.rotates


def test_asking_changes_nothing():
    tuner, model = attached(lora())
    before = {n: t.clone() for n, t in model.state_dict().items()}
    torch.manual_seed(3)
    tuner.change(model)
    assert torch.equal(torch.rand(2), torch.manual_seed(3) and torch.rand(2))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert AllWeights().change(Net()) is None and Frozen().change(Net()) is None


BESIDE = [True, False, "gaussian", "eva", "orthogonal"]
INTO = ["pissa", "pissa_niter_2", "olora"]


@pytest.mark.parametrize("init", [*BESIDE, *INTO])
def test_a_tuner_says_whether_its_initialisation_changes_the_base(init):
    base = Net()
    before = {n: p.detach().clone() for n, p in base.named_parameters()}
    tuner = PeftTuner(lora(init_lora_weights=init))
    after = weights_of(tuner.attach(base))
    assert tuner.changes_base == any(not torch.equal(after[n], p) for n, p in before.items()) == (init in INTO)


@pytest.mark.parametrize("branch", ["kept", "fresh"])
def test_rules_that_keep_old_outputs_refuse_it_in_any_loop(branch):
    model = peft.get_peft_model(Net(), lora(init_lora_weights="pissa"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(pt.RuleError, match="init_lora_weights=True"):
        pt.attach(model, optimizer, [pt.SubspaceProjection(branch=branch)])
    pt.attach(model, optimizer, [pt.ProductL1(1e-3)]).remove()  # promises nothing of the kind
