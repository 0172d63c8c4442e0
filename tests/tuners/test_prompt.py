"""Deep prompts: equal to prompts in the input of attentions; what they offer to projection, and what that is worth."""

from __future__ import annotations

import math
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.pytorch_utils import Conv1D

from perpetune.core.errors import RuleError
from perpetune.tuners import DeepPromptConfig
from perpetune.tuners.prefix import PromptLinear
from tests.tuners.imposing import change, maps_of, rows_read


def _layers(model: Any) -> list[PromptLinear]:
    return [m for m in model.modules() if isinstance(m, PromptLinear)]


def _tuned(base: Any, n: int = 3) -> Any:
    """With entries of order 1."""
    return peft.get_peft_model(base, DeepPromptConfig(num_virtual_tokens=n, init_std=1.0), autocast_adapter_dtype=False)


def _prepend(attention: Any, P: Tensor) -> None:
    """[P; x] into an attention, and the outputs of P dropped: VPT-Deep, behind the LayerNorm."""

    def before(_: Any, args: Any, kwargs: Any) -> Any:
        x = args[0] if args else kwargs.pop("hidden_states")
        return (torch.cat([P.expand(len(x), -1, -1), x], 1), *args[1:]), kwargs

    attention.register_forward_pre_hook(before, with_kwargs=True)
    attention.register_forward_hook(lambda _, args, out: (out[0][:, len(P) :], *out[1:]))


@pytest.mark.parametrize("name", ["bert", "vit", "clip", "gpt2"])
def test_equation(families, outputs, name):
    """A plain forward pass of the model with P before the input of every attention (LLaMA would give P a position)."""
    family = families[name]
    inputs = {k: v for k, v in family.inputs().items() if k != "attention_mask"}
    model, plain = _tuned(family.model(torch.float64)), family.model(torch.float64)
    layers = {k.rpartition(".")[0]: m for k, m in model.get_base_model().named_modules() if isinstance(m, PromptLinear)}
    assert len(layers) == 2
    for name, layer in layers.items():
        P = layer.perpetune_prompt_P["default"]
        assert P.shape == (3, 32)
        _prepend(plain.get_submodule(name), P)
    expected = outputs(plain, {**inputs, "use_cache": False} if name == "gpt2" else inputs)
    assert (expected - outputs(family.model(torch.float64), inputs)).abs().max() > 0.1
    torch.testing.assert_close(outputs(model, inputs), expected, rtol=0, atol=1e-11)


def test_equation_llama(families):
    """k_p = W_k p + b_k without a position, one key head for two query heads."""
    model = _tuned(families["llama"].model(torch.float64))
    base = model.get_base_model()
    attention, layer = base.layers[1].self_attn, _layers(model)[1]
    x, P = torch.randn(1, 5, 32, dtype=torch.float64), layer.perpetune_prompt_P["default"]
    position = base.rotary_emb(x, torch.arange(5)[None])
    got, _ = attention(x, position_embeddings=position)
    q = attention.q_proj(x).view(1, 5, 2, 16).transpose(1, 2)
    q, k = apply_rotary_pos_emb(q, layer.base_layer(x)[:, None], *position)
    K = torch.cat([P @ layer.weight.T + layer.bias, k[0, 0]])
    V = torch.cat([P @ attention.v_proj.weight.T + attention.v_proj.bias, attention.v_proj(x)[0]])
    scores = q[0] @ K.T / 4
    scores[:, :, 3:] += torch.full((5, 5), -math.inf).triu(1)
    expected = attention.o_proj((scores.softmax(-1) @ V).transpose(0, 1).flatten(1))
    torch.testing.assert_close(got[0], expected, rtol=0, atol=1e-12)


# ---- the projection rule ----


def test_maps(families):
    layer = _layers(_tuned(families["llama"].model(), n=5))[0]
    P = layer.perpetune_prompt_P["default"]
    affinity, aggregation = layer.linear_maps("per_head")
    assert (affinity.name, aggregation.name) == ("affinity", "aggregation") and (affinity.rows, aggregation.rows) == (
        0,
        1,
    )
    assert affinity.weight is P and aggregation.weight is P
    assert torch.equal(affinity.matrix(P), P) and torch.equal(aggregation.matrix(P), P.T)
    (tokens,) = layer.linear_maps("published")
    assert tokens.name == "tokens" and torch.equal(tokens.matrix(P), P)
    with pytest.raises(RuleError, match="did you mean `published`"):
        layer.linear_maps("publisched")
    layer.requires_grad_(False)
    assert layer.linear_maps("per_head") == []


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_what_the_maps_read(families, name):
    """u P^T are the scores without the bias' share, head after head; the input and P itself, as published."""
    model = _tuned(families[name].model(torch.float64), n=5)
    words = families[name].inputs(count=1)["input_ids"]
    layer = _layers(model)[0]
    x: list[Tensor] = []
    layer.base_layer.register_forward_pre_hook(lambda _, args: x.append(args[0]))
    tokens = layer.linear_maps("published")
    (read,) = rows_read(tokens, lambda: model(input_ids=words))
    assert torch.equal(read, torch.cat([x[0][0], layer.perpetune_prompt_P["default"]]))

    seen: list[tuple[Tensor, Tensor]] = []
    layer.show = lambda query, weights: (seen.append((query, weights())), PromptLinear.show(layer, query, weights))
    u, S = rows_read(layer.linear_maps("per_head"), lambda: model(input_ids=words))
    ((query, weights),) = seen
    assert u.shape == (2 * 6, 32) and torch.equal(S, weights[0].flatten(0, 1)) and S.shape == (2 * 6, 5)
    P, base = layer.perpetune_prompt_P["default"], layer.base_layer
    W = base.weight.T.split(32)[1] if isinstance(base, Conv1D) else base.weight
    K = (P @ W.T).view(5, -1, 16).transpose(0, 1)  # H_kv x n x head_dim
    scores = query[0] @ K.mT.expand(2, -1, -1)
    torch.testing.assert_close((u @ P.T).view(2, 6, 5), scores, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("condition", "sides", "least", "most"),
    [
        (None, (), 0.2, 1.0),
        ("published", ("tokens",), 0.1, 1.0),
        ("per_head", ("affinity",), 0.1, 1.0),
        ("per_head", ("aggregation",), 0.1, 1.0),
        ("per_head", ("affinity", "aggregation"), 0.0, 1e-12),
    ],
)
@pytest.mark.parametrize("seed", range(2))
def test_what_the_conditions_are_worth(seed, condition, sides, least, most):
    """The sheet's attention: d = 96, 4 heads, 64 slots, 12 old tokens, |dp| = 0.5 |p|, no LayerNorm, in fp64."""
    torch.manual_seed(seed)
    size = {"hidden_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 8}
    base = BertModel(BertConfig(**size, vocab_size=5, initializer_range=96**-0.5), add_pooling_layer=False)
    model = _tuned(base.double().eval(), n=64)
    attention, x = model.get_base_model().encoder.layer[0].attention.self, torch.randn(1, 12, 96, dtype=torch.float64)
    before = attention(x)[0].detach()
    maps = [m for m in maps_of(model, condition) if m.name in sides] if condition else []
    change(maps, rows_read(maps, lambda: attention(x)), [_layers(model)[0].perpetune_prompt_P["default"]], size=0.5)
    moved = ((attention(x)[0] - before).norm() / before.norm()).item()
    assert least <= moved <= most


def test_old_outputs_of_a_whole_model_stay(family, outputs):
    inputs = family.inputs(count=1)
    model = _tuned(family.model(torch.float64), n=20)
    before = outputs(model, inputs)
    maps = maps_of(model)
    change(maps, rows_read(maps, lambda: model(**inputs)), [m.weight for m in maps[::2]], 0.5)
    torch.testing.assert_close(outputs(model, inputs), before, rtol=0, atol=1e-11)


def test_the_trained_prompt_is_shown_beside_a_frozen_one(families, outputs):
    family = families["gpt2"]
    inputs = family.inputs(count=1)
    model = _tuned(family.model(torch.float64), n=20)
    model.add_adapter("task_0002", DeepPromptConfig(num_virtual_tokens=3), autocast_adapter_dtype=False)
    model.base_model.set_adapter(["task_0002", "default"])
    model.base_model.set_requires_grad("task_0002", False)
    before, maps = outputs(model, inputs), maps_of(model)
    change(maps, rows_read(maps, lambda: model(**inputs)), [p for p in model.parameters() if p.requires_grad], 0.5)
    torch.testing.assert_close(outputs(model, inputs), before, rtol=0, atol=1e-11)
