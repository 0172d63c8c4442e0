"""Targets by what they are, not by what a model happens to call them."""

from __future__ import annotations

import peft
import pytest

from perpetune.tuners import KEY_VALUE_FFN, PeftTuner

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
