"""Weight decay pulls to 0, and leaves alone what starts elsewhere."""

from __future__ import annotations

import peft
import pytest
from torch import nn

from perpetune.tuners.decay import decays

CONFIGS = {
    "IA3": lambda: peft.IA3Config(target_modules=["0"], feedforward_modules=[]),
    "BOFT": lambda: peft.BOFTConfig(target_modules=["0"], boft_block_size=4),
    "RoAd": lambda: peft.RoadConfig(target_modules=["0"], group_size=8),
    "VeRA": lambda: peft.VeraConfig(target_modules=["0"], r=4),
    "DoRA": lambda: peft.LoraConfig(target_modules=["0"], use_dora=True),
    "RandLoRA": lambda: peft.RandLoraConfig(target_modules=["0"], r=4),
    "LoRA": lambda: peft.LoraConfig(target_modules=["0"]),
    "OFT": lambda: peft.OFTConfig(target_modules=["0"], oft_block_size=4, r=0),
}


@pytest.mark.filterwarnings("ignore")  # of peft's CUDA kernels
@pytest.mark.parametrize("name", CONFIGS)
def test_constants_other_than_0_do_not_decay(name):
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), CONFIGS[name]())
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for n, p in trained.items():
        elsewhere = bool((p != 0).any()) and ("magnitude" in n or bool((p == p.flatten()[0]).all()))
        assert decays(n) == (not elsewhere), n
    assert any(not decays(n) for n in trained) == (name not in ("LoRA", "OFT"))
