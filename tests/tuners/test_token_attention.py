"""The attention function: tokens before keys and values, under every mask and position bias that models pass."""

from __future__ import annotations

import math
from types import SimpleNamespace

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, BertConfig, BertModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from perpetune.core.errors import ConfigError, ModelError
from perpetune.tuners import DeepPromptConfig, PeftTuner, PrefixConfig
from perpetune.tuners.key_projections import Heads, key_projections
from perpetune.tuners.prefix import PrefixLinear
from perpetune.tuners.token_attention import IMPLEMENTATION, attend, attention_weights

HEAD_DIM, SLOTS = 4, 3


def _attention(kv_heads: int, groups: int, causal: bool = False) -> nn.Module:
    """What `attend` knows of an attention: a child with tokens, perhaps wrapped, and two attributes."""
    width = kv_heads * HEAD_DIM
    heads = Heads(SimpleNamespace(_attn_implementation=IMPLEMENTATION), width, HEAD_DIM, groups, "value", False)
    layer = PrefixLinear(nn.Linear(5, width), "default", PrefixConfig(num_virtual_tokens=SLOTS), heads)
    attention = nn.ModuleDict({"query": nn.Identity(), "key": nn.Sequential(layer)}).double()
    attention.num_key_value_groups, attention.is_causal = groups, causal
    return attention


def _by_hand(
    attention: nn.Module, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, bias: Tensor | None, s: float
) -> Tensor:
    """One example and one head at a time; `seen` (N x T x S) of the keys of the input. N x T x H x head_dim."""
    layer = attention["key"][0]
    K, V = layer.perpetune_prefix_K["default"], layer.perpetune_prefix_V["default"]
    out = torch.empty_like(q)
    for i in range(len(q)):
        for h in range(q.shape[1]):
            g = h // attention.num_key_value_groups
            columns = slice(g * HEAD_DIM, (g + 1) * HEAD_DIM)
            keys, values = torch.cat([K[:, columns], k[i, g]]), torch.cat([V[:, columns], v[i, g]])
            scores = s * q[i, h] @ keys.T
            if bias is not None:
                scores[:, SLOTS:] += bias[0, h]
            scores[:, SLOTS:][~seen[i]] = -math.inf
            out[i, h] = scores.softmax(-1) @ values
    return out.transpose(1, 2)


def _tensors(T: int, S: int, kv_heads: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(2, kv_heads * groups, T, HEAD_DIM, dtype=torch.float64)
    k, v = torch.randn(2, 2, kv_heads, S, HEAD_DIM, dtype=torch.float64)
    return q, k, v


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "position bias"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize(("T", "S"), [(5, 5), (1, 5), (2, 5)])
def test_equation(T, S, mask, groups, biased):
    """softmax(s q [K_p; k]^T + bias) [V_p; v], whole or masked, where the last queries look at all keys so far."""
    attention = _attention(2, groups)
    q, k, v = _tensors(T, S, 2, groups)
    seen = torch.ones(2, T, S, dtype=torch.bool)
    given = None
    if mask is not None:
        seen = seen.tril(S - T)
        seen[1, :, :2] = False  # padding on the left; all of a row's own keys may be masked
        given = seen[:, None] if mask == "bool" else torch.zeros(2, 1, T, S).double().masked_fill(~seen[:, None], -1e30)
    bias = torch.randn(1, 2 * groups, T, S, dtype=torch.float64) if biased else None
    out, weights = attend(attention, q, k, v, given, scaling=0.7, position_bias=bias)
    assert weights is None
    torch.testing.assert_close(out, _by_hand(attention, q, k, v, seen, bias, 0.7), rtol=0, atol=1e-12)


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "position bias"])
@pytest.mark.parametrize(("own", "argument"), [(True, None), (False, True)])
def test_causal_without_a_mask(own, argument, biased):
    """Every query sees all tokens, and no later key, whether the module or the caller says that it is causal."""
    attention = _attention(2, 2, causal=own)
    q, k, v = _tensors(5, 5, 2, 2)
    bias = torch.randn(1, 4, 5, 5, dtype=torch.float64) if biased else None
    out, _ = attend(attention, q, k, v, None, is_causal=argument, position_bias=bias)
    seen = torch.ones(2, 5, 5, dtype=torch.bool).tril()
    torch.testing.assert_close(out, _by_hand(attention, q, k, v, seen, bias, 0.5), rtol=0, atol=1e-12)
    one, _ = attend(attention, q[:, :, :1], k, v, None, is_causal=argument)  # the newest query sees all
    everything = torch.ones(2, 1, 5, dtype=torch.bool)
    torch.testing.assert_close(one, _by_hand(attention, q[:, :, :1], k, v, everything, None, 0.5), rtol=0, atol=1e-12)


def test_unfilled_static_cache():
    """transformers gives no mask with the first text of a static cache: keys beyond the queries are rubbish."""
    attention = _attention(2, 2, causal=True)
    q, k, v = _tensors(3, 8, 2, 2)
    k[:, :, 3:], v[:, :, 3:] = torch.nan, torch.nan
    seen = torch.ones(2, 3, 3, dtype=torch.bool).tril()
    out, _ = attend(attention, q, k, v, None)
    expected = _by_hand(attention, q, k[:, :, :3], v[:, :, :3], seen, None, 0.5)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_a_module_without_live_tokens_is_left_alone():
    attention = _attention(2, 1, causal=True)
    q, k, v = _tensors(5, 5, 2, 1)
    expected, _ = sdpa_attention_forward(attention, q, k, v, None)
    whole, _ = sdpa_attention_forward(attention, q, k, v, None, is_causal=False)
    attention["key"][0].enable_adapters(False)
    assert torch.equal(attend(attention, q, k, v, None)[0], expected) and not torch.equal(whole, expected)
    assert torch.equal(attend(attention, q, k, v, None, is_causal=False)[0], whole)
    attention["key"] = nn.Identity()
    assert torch.equal(attend(attention, q, k, v, None)[0], expected)


def test_paged_caches_are_refused():
    q, k, v = _tensors(1, 5, 2, 1)
    with pytest.raises(ModelError, match="use `generate`"):
        attend(_attention(2, 1), q, k, v, None, cache=object())


def test_attention_weights_are_those_of_the_function():
    attention = _attention(2, 2)
    q, k, v = _tensors(5, 5, 2, 2)
    mask = torch.rand(2, 1, 5, 5) > 0.3
    mask[..., 0] = True
    bias = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    S = attention_weights(q, k, mask, bias, None)  # N x H x T x S
    out, _ = sdpa_attention_forward(attention, q, k, v, mask, is_causal=False, position_bias=bias)
    torch.testing.assert_close((S @ v.repeat_interleave(2, 1)).transpose(1, 2), out, rtol=0, atol=1e-12)
    assert attention_weights(q.bfloat16(), k.bfloat16(), None, None, 1.0).dtype == torch.float32


# ---- which models take tokens, and where ----

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50}
T5 = {"d_model": 32, "d_kv": 16, "num_heads": 2, "num_layers": 2, "d_ff": 64, "vocab_size": 50}


def _model(kind: str, **settings: object) -> nn.Module:
    with torch.device("meta"):
        return AutoModel.from_config(AutoConfig.for_model(kind, **settings))


@pytest.mark.parametrize(
    ("kind", "settings", "count", "ends"),
    [
        ("bert", SMALL, 2, {"key"}),
        ("bert", {**SMALL, "is_decoder": True, "add_cross_attention": True}, 2, {"attention.self.key"}),
        ("albert", {**SMALL, "embedding_size": 8}, 1, {"key"}),  # one layer, used again and again
        ("distilbert", {"dim": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 50}, 2, {"k_lin"}),
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 50}, 2, {"c_attn"}),
        (
            "gpt2",
            {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 50, "add_cross_attention": True},
            2,
            {"attn.c_attn"},
        ),
        ("t5", T5, 4, {"SelfAttention.k"}),
        ("bart", {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 50}, 4, {"self_attn.k_proj"}),
        ("clip", {}, 24, {"k_proj"}),
        ("qwen3", {**SMALL, "num_key_value_heads": 1, "head_dim": 8}, 2, {"k_proj"}),
    ],
)
def test_every_self_attention_is_found_and_no_other(kind, settings, count, ends):
    model = _model(kind, **settings)
    assert key_projections(model) == ends
    tuned = peft.get_peft_model(model, PrefixConfig(), low_cpu_mem_usage=True)
    assert sum(isinstance(m, PrefixLinear) for m in tuned.modules()) == count
    assert key_projections(tuned.get_base_model()) == ends  # for the next adapter


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("deberta-v2", SMALL, "interface, which DebertaV2Model lacks .its code does not use"),
        ("gemma2", {**SMALL, "num_key_value_heads": 1, "head_dim": 8}, "Gemma2Model does not support"),  # capped scores
        (
            "modernbert",
            {**SMALL, "pad_token_id": 0},
            "no attention of ModernBertModel has a key projection of a known name",
        ),
        ("gpt_bigcode", {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 50}, "no keys and values of one width"),
    ],
)
def test_other_models_are_refused_and_left_as_they_were(kind, settings, message):
    model = _model(kind, **settings)
    before = model.config._attn_implementation
    with pytest.raises(ModelError, match=message):
        peft.get_peft_model(model, PrefixConfig())
    assert model.config._attn_implementation == before
    assert not any(isinstance(m, PrefixLinear) for m in model.modules())


def test_one_part_that_cannot_take_tokens_spoils_the_whole():
    model = nn.ModuleDict({"one": _model("bert", **SMALL), "other": _model("deberta-v2", **SMALL)})
    with pytest.raises(ModelError, match="DebertaV2Model lacks"):
        peft.inject_adapter_in_model(PrefixConfig(target_modules=["key"]), model)
    assert model["one"].config._attn_implementation == "sdpa"


def test_prompts_need_projections_without_norms_behind_them():
    settings = {**SMALL, "num_key_value_heads": 1, "head_dim": 8}
    with pytest.raises(ModelError, match="normalised behind `layers.0.self_attn.k_proj`.*`PrefixConfig`"):
        peft.get_peft_model(_model("qwen3", **settings), DeepPromptConfig())


def test_other_modules_are_refused(families):
    for targets in (["value"], ["dense"]):
        with pytest.raises(ModelError, match="is not the key projection .key, k_proj"):
            peft.get_peft_model(families["bert"].model(), PrefixConfig(target_modules=targets))
    with pytest.raises(ModelError, match="leave `target_modules` out"):
        peft.get_peft_model(families["bert"].model(), PrefixConfig(target_modules="all-linear"))
    with pytest.raises(ModelError, match="is no transformers model"):
        peft.inject_adapter_in_model(PrefixConfig(target_modules=["key"]), nn.ModuleDict({"key": nn.Linear(2, 2)}))
    lora = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["key"]), families["bert"].model())
    with pytest.raises(ModelError, match="has a Linear already"):
        peft.inject_adapter_in_model(PrefixConfig(), lora, adapter_name="task_0001")


@pytest.mark.parametrize("settings", [{"num_virtual_tokens": 0}, {"init_std": -1.0}, {"init_std": float("nan")}])
@pytest.mark.parametrize("config", [PrefixConfig, DeepPromptConfig])
def test_settings_are_checked(config, settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        config(**settings)


# ---- the attention function of the model is ours while there are adapters ----


@pytest.mark.parametrize("before", ["sdpa", "eager"])
@pytest.mark.parametrize("config", [PrefixConfig, DeepPromptConfig])
def test_attention_is_set_and_set_back(config, before):
    base = BertModel(BertConfig(**SMALL, attn_implementation=before))
    model = peft.get_peft_model(base, config())
    assert base.config._attn_implementation == IMPLEMENTATION
    model.add_adapter("task_0002", config())
    model.delete_adapter("default")
    assert base.config._attn_implementation == IMPLEMENTATION
    model.delete_adapter("task_0002")
    assert base.config._attn_implementation == before
    model.add_adapter("task_0003", config())
    assert base.config._attn_implementation == IMPLEMENTATION
    assert model.unload().config._attn_implementation == before
    tuner = PeftTuner(config())
    assert tuner.detach(tuner.attach(base)).config._attn_implementation == before


def test_attention_of_the_parts_of_a_model():
    """Each part gets back its own."""
    small = {k: v for k, v in SMALL.items() if k != "vocab_size"}
    config = AutoConfig.for_model(
        "clip", text_config=SMALL, vision_config={**small, "image_size": 8, "patch_size": 4}, projection_dim=4
    )
    with torch.device("meta"):
        model = AutoModel.from_config(config, attn_implementation={"text_config": "eager", "vision_config": "sdpa"})
    parts = [model.config, model.config.text_config, model.config.vision_config]
    before = [part._attn_implementation for part in parts]
    assert before[1:] == ["eager", "sdpa"]
    tuned = peft.get_peft_model(model, PrefixConfig(), low_cpu_mem_usage=True)
    assert [part._attn_implementation for part in parts] == [IMPLEMENTATION] * 3
    tuned.unload()
    assert [part._attn_implementation for part in parts] == before


@pytest.mark.parametrize("config", [PrefixConfig, DeepPromptConfig])
def test_another_attention_would_pass_over_the_tokens(config, families):
    family = families["bert"]
    model = peft.get_peft_model(family.model(), config())
    model.get_base_model().set_attn_implementation("eager")
    with pytest.raises(ModelError, match="is `eager`, which passes over the tokens"):
        model(**family.inputs())
    with model.disable_adapter():
        model(**family.inputs())
    model.get_base_model().set_attn_implementation(IMPLEMENTATION)
    model(**family.inputs())
