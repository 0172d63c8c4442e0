from __future__ import annotations

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from perpetune.core.errors import RuleError
from perpetune.rules import lora_pairs


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 6)
        self.linear = nn.Linear(6, 4)
        self.transposed = Conv1D(9, 4)  # weight is 4 x 9: d_in x d_out
        self.conv = nn.Conv2d(3, 2, 3)

    def forward(self, ids):
        return self.transposed(self.linear(self.words(ids)))


def adapted(*targets: str) -> peft.PeftModel:
    return peft.get_peft_model(Mixed(), peft.LoraConfig(r=2, lora_alpha=6, target_modules=list(targets)))


def test_a_pair_is_the_change_of_its_layer():
    model = adapted("linear", "transposed")
    ids = torch.arange(10)[None]
    for pair in lora_pairs(model):
        nn.init.normal_(pair.B)
    with torch.no_grad():
        h = model.base_model.model.words(ids)
        first, second = lora_pairs(model)
        assert (first.shape, second.shape) == ((4, 6), (9, 4))
        assert (tuple(first.weight.shape), tuple(second.weight.shape)) == ((4, 6), (4, 9))
        for pair, W in ((first, first.weight), (second, second.weight.T)):
            bias = model.get_submodule(pair.name).get_base_layer().bias
            h = h @ (W + pair.scaling * pair.B @ pair.A).T + bias
        assert first.scaling == 3
        torch.testing.assert_close(model(ids), h)


def test_embeddings_and_convolutions_are_not_pairs():
    assert [pair.name for pair in lora_pairs(adapted("words", "conv", "linear"))] == ["base_model.model.linear"]
    assert lora_pairs(adapted("words", "conv")) == []
    assert lora_pairs(nn.Linear(2, 2)) == []


def test_frozen_adapters_of_earlier_tasks_are_left_out_and_names_do_not_change():
    model = adapted("linear", "transposed")
    names = [pair.name for pair in lora_pairs(model)]
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["linear", "transposed"]))
    model.base_model.set_adapter(["default", "second"])
    for name, p in model.named_parameters():
        p.requires_grad_("second" in name)
    pairs = lora_pairs(model)
    assert [pair.name for pair in pairs] == names
    assert {pair.A.shape[0] for pair in pairs} == {3}


def test_two_adapters_trained_at_once_are_refused():
    model = adapted("linear")
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["linear"]))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(RuleError, match="`base_model.model.linear` trains 2"):
        lora_pairs(model)


def test_a_disabled_or_frozen_adapter_has_no_pairs():
    model = adapted("linear")
    with model.disable_adapter():
        assert lora_pairs(model) == []
    assert len(lora_pairs(model)) == 1
    model.requires_grad_(False)
    assert lora_pairs(model) == []


def test_a_tuner_that_is_not_lora_has_no_pairs():
    config = peft.AdaLoraConfig(target_modules=["linear"], total_step=10)
    assert lora_pairs(peft.get_peft_model(Mixed(), config)) == []
    assert (
        lora_pairs(peft.get_peft_model(Mixed(), peft.IA3Config(target_modules=["linear"], feedforward_modules=[])))
        == []
    )
