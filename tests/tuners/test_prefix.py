"""Prefixes: their equation in two attentions, what they offer to the projection rule, and what that is worth."""

from __future__ import annotations

import math
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, T5Config, T5Model
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from perpetune.core.errors import ModelError, RuleError
from perpetune.tuners import PrefixConfig
from perpetune.tuners.prefix import PrefixLinear
from tests.tuners.imposing import change, maps_of, rows_read


def _layers(model: Any) -> list[PrefixLinear]:
    return [m for m in model.modules() if isinstance(m, PrefixLinear)]


def _tuned(base: Any, n: int = 3) -> Any:
    """With keys and values of order 1."""
    return peft.get_peft_model(base, PrefixConfig(num_virtual_tokens=n, init_std=1.0), autocast_adapter_dtype=False)


def _heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(-2, -3)  # T x (H d_h) to H x T x d_h


def test_equation_bert(families):
    """K = [K_p; x W_K], V = [V_p; x W_V]: every token sees the prefix and every token that is not padding."""
    model = _tuned(families["bert"].model(torch.float64))
    attention = model.get_base_model().encoder.layer[1].attention.self
    x = torch.randn(5, 32, dtype=torch.float64)
    seen = torch.tensor([True, True, False, True, True])
    got, _ = attention(x[None], attention_mask=seen[None, None, None].expand(1, 1, 5, 5))
    layer = _layers(model)[1]
    K_p, V_p = layer.perpetune_prefix_K["default"], layer.perpetune_prefix_V["default"]
    assert K_p.shape == V_p.shape == (3, 32)
    Q = _heads(attention.query(x), 2)
    K = _heads(torch.cat([K_p, layer.base_layer(x[seen])]), 2)
    V = _heads(torch.cat([V_p, attention.value(x[seen])]), 2)
    expected = torch.softmax(Q @ K.mT / math.sqrt(16), -1) @ V
    torch.testing.assert_close(got[0], expected.transpose(0, 1).flatten(1), rtol=0, atol=1e-12)


def test_equation_llama(families):
    """Causal, with rotary positions, and one key head for two query heads: the prefix has no position."""
    model = _tuned(families["llama"].model(torch.float64))
    base = model.get_base_model()
    attention = base.layers[1].self_attn
    x = torch.randn(1, 5, 32, dtype=torch.float64)
    position = base.rotary_emb(x, torch.arange(5)[None])
    got, _ = attention(x, position_embeddings=position)
    layer = _layers(model)[1]
    K_p, V_p = layer.perpetune_prefix_K["default"], layer.perpetune_prefix_V["default"]
    assert K_p.shape == V_p.shape == (3, 16)
    Q, k = apply_rotary_pos_emb(_heads(attention.q_proj(x), 2), _heads(layer.base_layer(x), 1), *position)
    K, V = torch.cat([K_p, k[0, 0]]), torch.cat([V_p, attention.v_proj(x)[0]])
    scores = Q[0] @ K.T / math.sqrt(16)
    later = torch.ones(5, 5, dtype=torch.bool).triu(1)
    scores[:, :, 3:] = scores[:, :, 3:].masked_fill(later, -math.inf)
    expected = attention.o_proj((scores.softmax(-1) @ V).transpose(0, 1).flatten(1))
    torch.testing.assert_close(got[0], expected, rtol=0, atol=1e-12)


def _t5() -> Any:
    torch.manual_seed(0)
    config = T5Config(d_model=32, d_kv=16, num_heads=2, num_layers=2, d_ff=64, vocab_size=50, dropout_rate=0.0)
    return T5Model(config).double().eval()


def _repel(model: Any, inputs: dict[str, Tensor]) -> None:
    """Keys that no query of these inputs looks at: q K_p^T = -10^4, in layer after layer."""
    for layer in _layers(model):
        maps = [m for m in layer.linear_maps("per_head") if m.name.startswith("key")]
        for m, Q in zip(maps, rows_read(maps, lambda: model(**inputs)), strict=True):
            u = torch.linalg.pinv(Q) @ torch.ones(len(Q), dtype=Q.dtype)
            torch.testing.assert_close(Q @ u, torch.ones(len(Q), dtype=Q.dtype))
            m.matrix(m.weight).copy_(-1e4 * u)


def test_a_prefix_nobody_looks_at_changes_nothing(family, outputs):
    inputs = family.inputs(count=1)
    base = outputs(family.model(torch.float64), inputs)
    model = _tuned(family.model(torch.float64))
    assert (outputs(model, inputs) - base).abs().max() > 0.1
    _repel(model, inputs)
    torch.testing.assert_close(outputs(model, inputs), base, rtol=0, atol=1e-12)


def test_t5_keeps_its_position_bias(outputs):
    """Encoder and decoder; the cross-attention has no prefix."""
    words = torch.tensor([[3, 4, 5, 6]])
    inputs = {"input_ids": words, "decoder_input_ids": words}
    base = outputs(_t5(), inputs)
    model = _tuned(_t5())
    assert len(_layers(model)) == 4
    assert (outputs(model, inputs) - base).abs().max() > 0.1
    _repel(model, inputs)
    torch.testing.assert_close(outputs(model, inputs), base, rtol=0, atol=1e-12)


# ---- the projection rule ----


def test_maps(families):
    """Names without the adapter's, one map a key head, read by all heads that share it."""
    layer = _layers(_tuned(families["llama"].model(), n=5))[0]
    key, value = layer.linear_maps("per_head")
    assert (key.name, value.name) == ("key.0", "value.0")
    K, V = layer.perpetune_prefix_K["default"], layer.perpetune_prefix_V["default"]
    assert key.weight is K and value.weight is V and (key.rows, value.rows) == (0, 1)
    assert torch.equal(key.matrix(K), K) and torch.equal(value.matrix(V), V.T)
    with pytest.raises(ModelError, match="2 heads share: use `per_head`"):
        layer.linear_maps("published")
    with pytest.raises(RuleError, match="did you mean `per_head`"):
        layer.linear_maps("per_heads")

    layer = _layers(_tuned(families["bert"].model(), n=5))[0]
    maps = layer.linear_maps("per_head")
    assert [m.name for m in maps] == ["key.0", "value.0", "key.1", "value.1"]
    K, V = layer.perpetune_prefix_K["default"], layer.perpetune_prefix_V["default"]
    assert torch.equal(maps[2].matrix(K), K[:, 16:]) and torch.equal(maps[3].matrix(V), V[:, 16:].T)
    assert [(m.name, m.width) for m in layer.linear_maps("published")] == [("key", 32)]
    layer.requires_grad_(False)
    assert layer.linear_maps("per_head") == []


def test_what_the_maps_read(families):
    """Queries with positions, head after head, and the weights on the prefix alone; nothing while nobody listens."""
    family = families["llama"]
    model = _tuned(family.model(torch.float64), n=5)
    inputs = {"input_ids": family.inputs(count=1)["input_ids"]}
    maps = maps_of(model)
    Q, S = rows_read(maps, lambda: model(**inputs))[:2]
    assert Q.shape == (2 * 6, 16) and S.shape == (2 * 6, 5)
    base, layer = model.get_base_model(), _layers(model)[0]
    x = base.layers[0].input_layernorm(base.embed_tokens(inputs["input_ids"]))
    attention = base.layers[0].self_attn
    position = base.rotary_emb(x, torch.arange(6)[None])
    q, k = apply_rotary_pos_emb(_heads(attention.q_proj(x), 2), _heads(layer.base_layer(x), 1), *position)
    torch.testing.assert_close(Q, q[0].flatten(0, 1), rtol=0, atol=1e-12)
    K = torch.cat([layer.perpetune_prefix_K["default"], k[0, 0]])
    scores = q[0] @ K.T / 4
    scores[:, :, 5:] += torch.full((6, 6), -math.inf).triu(1)
    torch.testing.assert_close(S, scores.softmax(-1)[..., :5].flatten(0, 1), rtol=0, atol=1e-12)

    layer.show = None  # from here on nobody listens
    model(**inputs)


def test_every_key_head_is_read_by_the_queries_that_share_it():
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 8}
    model = _tuned(LlamaModel(LlamaConfig(**size, vocab_size=9, num_key_value_heads=2)).eval(), n=5)
    (layer,), seen = _layers(model), []
    layer.show = lambda query, weights: (seen.append((query, weights())), PrefixLinear.show(layer, query, weights))
    maps = layer.linear_maps("per_head")
    rows = rows_read(maps, lambda: model(input_ids=torch.tensor([[1, 2, 3]])))
    ((query, weights),) = seen
    for h, (Q, S) in enumerate(zip(rows[::2], rows[1::2], strict=True)):
        assert torch.equal(Q, query[0, 2 * h : 2 * h + 2].flatten(0, 1))
        assert torch.equal(S, weights[0, 2 * h : 2 * h + 2].flatten(0, 1))


def test_published_reads_all_heads_in_one(families):
    model = _tuned(families["bert"].model(torch.float64))
    words = families["bert"].inputs(count=1)["input_ids"]
    projection = model.get_base_model().encoder.layer[0].attention.self.query
    expected: list[Tensor] = []
    projection.register_forward_hook(lambda _, args, out: expected.append(out[0]))
    Q = rows_read(_layers(model)[0].linear_maps("published"), lambda: model(input_ids=words))
    assert torch.equal(Q[0], expected[0])


def test_no_two_maps_seem_to_read_the_same(families):
    """The rule finds maps that share an input by the addresses of what they read."""
    model = _tuned(families["bert"].model())
    seen: list[Tensor] = []
    for m in maps_of(model):
        m.modules[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(**families["bert"].inputs())
    assert len({x.data_ptr() for x in seen}) == len(seen) == 2 * 4


def _one_layer(seed: int) -> tuple[Any, Any, Tensor]:
    """The sheet's attention: d = 96, 4 heads, 64 slots, 12 old tokens."""
    torch.manual_seed(seed)
    size = {"hidden_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 8}
    base = BertModel(BertConfig(**size, vocab_size=5, initializer_range=96**-0.5), add_pooling_layer=False)
    model = _tuned(base.double().eval(), n=64)
    return model, model.get_base_model().encoder.layer[0].attention.self, torch.randn(1, 12, 96, dtype=torch.float64)


@pytest.mark.parametrize(
    ("condition", "values", "least", "most"),
    [
        (None, "free", 0.2, 1.0),
        ("published", "frozen", 0.05, 1.0),
        ("published", "free", 0.2, 1.0),
        ("per_head", "frozen", 0.0, 1e-12),
        ("per_head", "unprotected", 0.2, 1.0),
        ("per_head", "free", 0.0, 1e-12),  # in the left null space of the attention weights
    ],
)
@pytest.mark.parametrize("seed", range(2))
def test_what_the_conditions_are_worth(seed, condition, values, least, most):
    """Relative change of old outputs of one layer, each condition imposed exactly, |dp| = 0.5 |p|, in fp64."""
    model, attention, x = _one_layer(seed)
    before = attention(x)[0].detach()
    maps = maps_of(model, condition) if condition else []
    if values == "unprotected":
        maps = [m for m in maps if m.name.startswith("key")]
    rows = rows_read(maps, lambda: attention(x))
    layer = _layers(model)[0]
    K, V = layer.perpetune_prefix_K["default"], layer.perpetune_prefix_V["default"]
    change(maps, rows, [K] if values == "frozen" else [K, V], size=0.5)
    moved = ((attention(x)[0] - before).norm() / before.norm()).item()
    assert least <= moved <= most


def test_old_outputs_of_a_whole_model_stay(family, outputs):
    inputs = family.inputs(count=1)
    model = _tuned(family.model(torch.float64), n=20)
    before = outputs(model, inputs)
    maps = maps_of(model)
    change(maps, rows_read(maps, lambda: model(**inputs)), [p for p in model.parameters() if p.requires_grad], 0.5)
    torch.testing.assert_close(outputs(model, inputs), before, rtol=0, atol=1e-11)
    other = family.inputs(seed=1, count=1)
    model.disable_adapter_layers()
    base = outputs(model, other)
    model.enable_adapter_layers()
    assert (outputs(model, other) - base).abs().max() > 0.1


def test_the_trained_prefix_is_shown_beside_a_frozen_one(families, outputs):
    family = families["bert"]
    inputs = family.inputs(count=1)
    model = _tuned(family.model(torch.float64), n=3)
    model.add_adapter("task_0002", PrefixConfig(num_virtual_tokens=20, init_std=1.0), autocast_adapter_dtype=False)
    model.base_model.set_adapter(["default", "task_0002"])
    with pytest.raises(RuleError, match="default, task_0002 train at once: freeze all but one"):
        maps_of(model)
    model.base_model.set_requires_grad("default", False)
    before, maps = outputs(model, inputs), maps_of(model)
    rows = rows_read(maps, lambda: model(**inputs))
    assert {X.shape[-1] for m, X in zip(maps, rows, strict=True) if m.name.startswith("value")} == {20}
    change(maps, rows, [p for p in model.parameters() if p.requires_grad], 0.5)
    torch.testing.assert_close(outputs(model, inputs), before, rtol=0, atol=1e-11)
