"""Targets by what they are, not by what a model happens to call them."""

from __future__ import annotations

import peft
import pytest

from perpetune import ConfigError, ModelError
from perpetune.tuners import KEY_VALUE_FFN, FusedLoraConfig, PeftTuner
from perpetune.tuners.targets import resolve_targets

EXPECTED = {
    "bert": ({"key", "value"}, {"output.dense"}),
    "vit": ({"k_proj", "v_proj"}, {"fc2"}),
    "llama": ({"k_proj", "v_proj"}, {"down_proj"}),
    "clip": ({"k_proj", "v_proj"}, {"fc2"}),
    "gpt2": ({"c_attn"}, {"mlp.c_proj"}),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_keys_values_and_feed_forward_outputs(name, families):
    config = peft.IA3Config(target_modules=KEY_VALUE_FFN, feedforward_modules=KEY_VALUE_FFN)
    model = PeftTuner(config).attach(families[name].model())
    layers = {n: m for n, m in model.named_modules() if isinstance(m, peft.tuners.ia3.IA3Layer)}
    attention, feed_forward = EXPECTED[name]
    for ends, scaled_input in ((attention, False), (feed_forward, True)):
        found = {n: m for n, m in layers.items() if any(n.endswith(f".{end}") for end in ends)}
        assert len(found) == 2 * len(ends)  # two layers; the output of an attention is no feed-forward one
        assert all(m.is_feedforward is scaled_input for m in found.values())
    assert len(layers) == 2 * (len(attention) + 1)
    assert not any("attention.output" in n for n in layers)


def test_targets_that_are_no_names_are_refused(families):
    model = families["bert"].model()
    for wrong in ([1], [None], ["query", 1], {"query", 1}, {"query": 1}, {1: 2}, True, 7, None):
        with pytest.raises(ModelError, match="`target_modules` holds names of modules"):
            resolve_targets(model, wrong)


@pytest.mark.parametrize("wrong", [0.5, 0, -1, True, "two", []])
def test_a_number_of_blocks_is_a_number(wrong):
    with pytest.raises(ConfigError, match="blocks=.* must be a whole number above 0"):
        FusedLoraConfig(target_modules=["query"], blocks=wrong)
