"""Tiny models of the families that tuners must fit: random, of two layers and width 32, without dropout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

WIDTH, LAYERS, WORDS = 32, 2, 50
COMMON = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 64}


def _bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertModel(BertConfig(**COMMON, **quiet, vocab_size=WORDS, initializer_range=0.2))


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(**COMMON, image_size=8, patch_size=4, initializer_range=0.2))


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    biased = {"attention_bias": True, "mlp_bias": True}
    shape = {"num_key_value_heads": 1, "max_position_embeddings": 64}
    return LlamaModel(LlamaConfig(**COMMON, **shape, **biased, vocab_size=WORDS, initializer_range=0.2))


def _clip() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    ends = {"bos_token_id": 0, "eos_token_id": WORDS - 1, "pad_token_id": 1}
    return CLIPTextModel(CLIPTextConfig(**COMMON, **ends, vocab_size=WORDS, initializer_factor=5.0))


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2Model

    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    shape = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2, "n_positions": 64}
    return GPT2Model(GPT2Config(**shape, **quiet, vocab_size=WORDS, initializer_range=0.2))


@dataclass(frozen=True)
class Family:
    """One kind of model.

    Attributes:
        name: of the family.
        make: builds one, with whatever random numbers there are.
    """

    name: str
    make: Callable[[], nn.Module]

    def model(self, dtype: torch.dtype = torch.float32) -> Any:
        """The same weights at every call, in eval mode; biases are not 0, as in a model that was trained."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.make().eval()
            for key, p in model.named_parameters():
                if key.endswith("bias"):
                    nn.init.normal_(p, std=0.1)
        return model.to(dtype)

    def inputs(self, seed: int = 0, count: int = 4) -> dict[str, Tensor]:
        """Keyword arguments of the model: `count` texts of 6 words, of which the last has 2 padded, or images."""
        generator = torch.Generator().manual_seed(seed)
        if self.name == "vit":
            return {"pixel_values": torch.randn(count, 3, 8, 8, generator=generator)}
        mask = torch.ones(count, 6, dtype=torch.long)
        mask[-1, 4:] = 0
        return {"input_ids": torch.randint(2, WORDS - 1, (count, 6), generator=generator), "attention_mask": mask}


FAMILIES = {f.name: f for f in (Family("bert", _bert), Family("vit", _vit), Family("llama", _llama),
                                Family("clip", _clip), Family("gpt2", _gpt2))}  # fmt: skip


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    """Every family in turn."""
    return FAMILIES[request.param]


@pytest.fixture
def families() -> dict[str, Family]:
    """All families by name: `bert`, `vit`, `llama` (with biases, grouped queries), `clip` (text), `gpt2` (`Conv1D`)."""
    return FAMILIES


@pytest.fixture
def outputs() -> Callable[..., Tensor]:
    """`outputs(model, inputs)`: the hidden states, one row a token that is not padding, in eval mode."""

    def run(model: Any, inputs: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            hidden = model.eval()(**inputs).last_hidden_state
        return hidden[inputs["attention_mask"].bool()] if "attention_mask" in inputs else hidden.flatten(0, 1)

    return run


@pytest.fixture
def train() -> Callable[..., list[float]]:
    """`train(model, inputs, steps=20, lr=1e-2)`: AdamW towards other labels for every input; the losses."""

    def run(model: Any, inputs: dict[str, Tensor], steps: int = 20, lr: float = 1e-2) -> list[float]:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.01)
        losses = []
        for _ in range(steps):
            hidden = model(**inputs).last_hidden_state[:, 0 if "pixel_values" in inputs else 3, :8].float()
            loss = nn.functional.cross_entropy(hidden, torch.arange(len(hidden)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    return run
