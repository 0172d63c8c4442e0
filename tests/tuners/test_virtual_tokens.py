"""What prefixes and prompts share: batches, generation, several adapters, saving, refusals."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import perpetune
from perpetune.core.errors import ModelError
from perpetune.recipes.recipe import Recipe
from perpetune.rules import SubspaceProjection, attach
from perpetune.tuners import DeepPromptConfig, PeftTuner, PrefixConfig, load_adapter
from perpetune.tuners.token_attention import IMPLEMENTATION
from tests.tuners.imposing import maps_of, rows_read

WEIGHTS = {"PrefixConfig": {"perpetune_prefix_K", "perpetune_prefix_V"}, "DeepPromptConfig": {"perpetune_prompt_P"}}


@pytest.fixture(params=[PrefixConfig, DeepPromptConfig])
def config(request):
    return request.param


def _trained(config, family, train, name="task_0001", seed=0, steps=3, **settings):
    torch.manual_seed(seed)
    model = peft.get_peft_model(family.model(), config(**{"num_virtual_tokens": 4, **settings}), adapter_name=name)
    train(model, family.inputs(seed), steps)
    return model


def test_training_changes_the_tokens_alone(config, family, train):
    base = family.model()
    model = peft.get_peft_model(family.model(), config(num_virtual_tokens=4), adapter_name="task_0001")
    losses = train(model, family.inputs(), steps=20, lr=0.1)
    assert losses[-1] < 0.7 * losses[0]
    after = {k.replace(".base_layer", ""): p for k, p in model.get_base_model().named_parameters()}
    frozen = dict(base.named_parameters())
    assert all(torch.equal(after[k], p) and not after[k].requires_grad for k, p in frozen.items())
    new = after.keys() - frozen.keys()
    assert {k.split(".")[-2] for k in new} == WEIGHTS[config.__name__] and all(after[k].requires_grad for k in new)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_padded_batch_equals_single_texts(config, families, side):
    for name in ("bert", "llama", "clip", "gpt2"):
        model = peft.get_peft_model(families[name].model(torch.float64), config(init_std=1.0)).eval()
        words = torch.randint(2, 49, (3, 6))
        words[:, 5] = 49  # where CLIP pools
        for length in (6, 4, 1):
            mask = torch.zeros(3, 6, dtype=torch.long)
            real = slice(0, length) if side == "right" else slice(6 - length, 6)
            mask[:, real] = 1
            mask[0] = 1
            place = (mask.cumsum(1) - 1).clamp(min=0)
            with torch.no_grad():
                batch = model(input_ids=words, attention_mask=mask, position_ids=place).last_hidden_state[1, real]
                single = model(input_ids=words[1:2, real]).last_hidden_state[0]
            torch.testing.assert_close(batch, single, rtol=0, atol=1e-10)


# ---- generation ----


def _writer(kind: str) -> Any:
    torch.manual_seed(0)
    ends: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 1, "vocab_size": 50}
    if kind == "llama":
        shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        return LlamaForCausalLM(LlamaConfig(**shape, **ends, num_key_value_heads=2, initializer_range=0.2)).double()
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, **ends, initializer_range=0.2)).double()
    shape = {"d_model": 32, "d_kv": 16, "num_heads": 2, "num_layers": 2, "d_ff": 64, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(**shape, **ends)).double()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_generation_with_a_cache_equals_generation_without(config, kind):
    """The cache holds words only, whatever its kind."""
    model = peft.get_peft_model(_writer(kind), config(num_virtual_tokens=4, init_std=1.0)).eval()
    words, mask = torch.randint(2, 49, (2, 5)), torch.ones(2, 5, dtype=torch.long)
    mask[1, :2] = 0
    settings = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    for attention_mask in (torch.ones_like(mask), mask):
        given = {"input_ids": words, "attention_mask": attention_mask, **settings}
        plain = model.generate(**given, use_cache=False)
        caches = [{"use_cache": True}]
        if kind == "llama":
            caches.append({"cache_implementation": "static", "disable_compile": True})
        for cache in caches:
            cached = model.generate(**given, **cache)
            assert torch.equal(cached.sequences, plain.sequences)
            for got, expected in zip(cached.logits, plain.logits, strict=True):
                torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    with model.disable_adapter():
        assert not torch.equal(model.generate(**given).logits[0], plain.logits[0])
    if kind != "t5":
        assert model(input_ids=words).past_key_values.get_seq_length() == 5
        half = model(input_ids=words[:, :2])
        rest = model(input_ids=words[:, 2:], past_key_values=half.past_key_values)
        torch.testing.assert_close(rest.logits, model(input_ids=words).logits[:, 2:], rtol=0, atol=1e-10)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(config, reentrant):
    model = peft.get_peft_model(_writer("llama"), config(num_virtual_tokens=4)).train()
    words = torch.randint(2, 49, (2, 5))
    own = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(model(input_ids=words, labels=words, use_cache=False).loss, own)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model(input_ids=words, labels=words, use_cache=False).loss.backward()
    for p, g in zip(own, expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=0, atol=1e-12)
        assert g.any()


def test_compiled_in_one_graph(config, families):
    family = families["llama"]
    model = peft.get_peft_model(family.model(), config(num_virtual_tokens=4)).eval()
    inputs = family.inputs()
    expected = model(**inputs).last_hidden_state
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs).last_hidden_state, expected)


# ---- adapters ----


def test_saved_and_loaded_to_the_bit(config, family, outputs, train, tmp_path):
    model, inputs = _trained(config, family, train), family.inputs()
    rows_read(maps_of(model), lambda: model(**inputs))  # taps leave nothing behind
    layer = next(m for m in model.modules() if hasattr(m, "linear_maps"))
    layer.register_buffer("derived", torch.ones(1), persistent=False)
    expected = outputs(model, inputs)
    model.save_pretrained(tmp_path)
    folder = tmp_path / "task_0001"
    stored = load_file(folder / "adapter_model.safetensors")
    assert len(stored) == sum(p.requires_grad for p in model.parameters()) == 2 * len(WEIGHTS[config.__name__])
    assert {k.rpartition(".")[2] for k in stored} == WEIGHTS[config.__name__]
    for settings in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True}, {"adapter_name": "another"}):
        loaded = load_adapter(family.model(), folder, **settings)
        assert torch.equal(outputs(loaded, inputs), expected)
        assert any(p.requires_grad for p in loaded.parameters()) == ("is_trainable" in settings)


def test_several_adapters(config, family, outputs, train, tmp_path):
    inputs, base = family.inputs(), outputs(family.model(), family.inputs())
    model = _trained(config, family, train, "task_0001")
    first = outputs(model, inputs)
    torch.manual_seed(7)
    model.add_adapter("task_0002", config(num_virtual_tokens=3, init_std=1.0))
    assert not any(p.requires_grad for k, p in model.named_parameters() if ".task_0002" in k)
    assert torch.equal(outputs(model, inputs), first)
    model.set_adapter("task_0002")
    second = outputs(model, inputs)
    model.base_model.set_adapter(["task_0001", "task_0002"])
    both = outputs(model, inputs)
    assert min((a - b).abs().max() for a, b in ((first, second), (first, both), (second, both), (first, base))) > 1e-3

    joined = peft.get_peft_model(family.model(), config(num_virtual_tokens=7))
    parts = [get_peft_model_state_dict(model, adapter_name=f"task_000{i}") for i in (1, 2)]
    set_peft_model_state_dict(joined, {k: torch.cat([v, parts[1][k]]) for k, v in parts[0].items()})
    torch.testing.assert_close(outputs(joined, inputs), both)

    model.save_pretrained(tmp_path, selected_adapters=["task_0002"])
    assert not (tmp_path / "task_0001").exists()
    assert torch.equal(outputs(load_adapter(family.model(), tmp_path / "task_0002"), inputs), second)
    with model.disable_adapter():
        assert torch.equal(outputs(model, inputs), base)
    model.set_adapter("task_0001")
    assert torch.equal(outputs(model, inputs), first)
    model.delete_adapter("task_0002")
    assert torch.equal(outputs(model, inputs), first) and list(model.peft_config) == ["task_0001"]
    model.load_adapter(tmp_path / "task_0002", "task_0002")
    model.base_model.set_adapter(["task_0001", "task_0002"])
    assert torch.equal(outputs(model, inputs), both)
    assert torch.equal(outputs(model.unload(), inputs), base)


def test_injected_into_a_plain_model(config, families, outputs, train):
    family = families["bert"]
    source, inputs = _trained(config, family, train), family.inputs()
    target = peft.inject_adapter_in_model(config(num_virtual_tokens=4), family.model(), adapter_name="task_0009")
    tensors = get_peft_model_state_dict(source, adapter_name="task_0001")
    result: Any = set_peft_model_state_dict(target, tensors, adapter_name="task_0009")
    assert not result.unexpected_keys
    assert torch.equal(outputs(target, inputs), outputs(source, inputs))


def test_half_precision_base_has_tokens_in_fp32(config, family, outputs, train, tmp_path):
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in family.inputs().items()}
    model = peft.get_peft_model(family.model(torch.bfloat16), config(num_virtual_tokens=4), adapter_name="task_0001")
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    losses = train(model, inputs, steps=5)
    assert losses[-1] < losses[0]
    got = outputs(model, inputs)
    assert got.dtype == torch.bfloat16
    assert {X.dtype for X in rows_read(maps_of(model), lambda: model(**inputs))} <= {torch.float32, torch.bfloat16}
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(load_adapter(family.model(torch.bfloat16), tmp_path / "task_0001"), inputs), got)


def test_copies_are_independent(config, families, outputs):
    family = families["llama"]
    model = peft.get_peft_model(family.model(), config())
    inputs, expected = family.inputs(), outputs(model, family.inputs())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(other, inputs), expected)
        assert torch.equal(outputs(other.unload(), inputs), outputs(family.model(), inputs))
        assert model.get_base_model().config._attn_implementation == IMPLEMENTATION
        assert torch.equal(outputs(model, inputs), expected)


def test_configurations_survive_copies_and_json(config, tmp_path):
    made = config(num_virtual_tokens=5, init_std=0.5, target_modules=["key"], layers_to_transform=[0, 1])
    assert pickle.loads(pickle.dumps(made)) == copy.deepcopy(made) == made
    made.save_pretrained(tmp_path)
    assert peft.PeftConfig.from_pretrained(tmp_path) == made
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "from_the_future": 1}))
    with pytest.warns(UserWarning, match="from_the_future"):
        assert peft.PeftConfig.from_pretrained(tmp_path) == made
    data = {"type": config.__name__, "num_virtual_tokens": 5}
    assert Recipe.from_dict({"tuner": data}).to_dict()["tuner"] == data


def test_only_some_layers(config, families, outputs):
    """An attention without tokens is as it was, beside one that has some."""
    family = families["clip"]
    model = peft.get_peft_model(family.model(), config(layers_to_transform=[1]))
    assert len(maps_of(model, "published")) == 1
    hidden = [m(**family.inputs(), output_hidden_states=True).hidden_states for m in (model, family.model())]
    same = [torch.equal(a, b) for a, b in zip(*hidden, strict=True)]
    assert same == [True, True, False]


def test_merging_is_refused_at_both_doors(config, families):
    model = peft.get_peft_model(families["bert"].model(), config())
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ModelError, match="no weight of the model could hold them"):
            merge()
    assert maps_of(model)


@pytest.mark.parametrize("name", ["0", "encoder", "key"])
def test_names_under_which_tensors_would_be_lost_are_refused(config, families, name):
    with pytest.raises(ModelError, match="task_0007"):
        peft.get_peft_model(families["bert"].model(), config(), adapter_name=name)


@pytest.mark.filterwarnings("ignore:SubspaceProjection. the published conditions")
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_projection_keeps_old_outputs(config, families, outputs, train, name):
    """Under AdamW with decay: per head as good as exactly, and as published (where that fits) not at all."""
    family = families[name]
    old, new = family.inputs(1, count=1), family.inputs(2)
    conditions = ["none", "per_head"] + (["published"] if (config, name) != (PrefixConfig, "llama") else [])
    moved = {}
    for condition in conditions:
        torch.manual_seed(0)
        model = PeftTuner(config(num_virtual_tokens=24)).attach(family.model(torch.float64)).double()
        train(model, old, 10)
        before = [outputs(model, x) for x in (old, new)]
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.01)
        if condition != "none":
            rule = SubspaceProjection(energy=1.0, prompts=condition)
            rule.observe(model, lambda: [old])
            attach(model, optimizer, [rule], index=1)
        for _ in range(20):
            optimizer.zero_grad()
            (model(**new).last_hidden_state - 1).square().mean().backward()
            optimizer.step()
        after = [outputs(model, x) for x in (old, new)]
        moved[condition] = [((a - b).norm() / b.norm()).item() for a, b in zip(after, before, strict=True)]
    assert moved["per_head"][0] < 1e-12 and all(new > 1e-3 for _, new in moved.values())
    assert all(old > 0.02 for condition, (old, _) in moved.items() if condition != "per_head")


def _hidden(model: Any, family: Any) -> list[float]:
    import torch

    with torch.no_grad():
        return model.eval()(**family.inputs()).last_hidden_state.flatten()[:40].tolist()


ELSEWHERE = """
import sys
sys.path[:0] = {path!r}
import peft, torch, perpetune
from conftest import FAMILIES
torch.set_num_threads(1)
family = FAMILIES["bert"]
for folder in {folders!r}:
    try:
        peft.PeftModel.from_pretrained(family.model(), folder)
    except KeyError as error:
        print("KeyError", error)
for folder in {folders!r}:
    print(_hidden(perpetune.load_adapter(family.model(), folder), family))
"""


def test_loaded_in_a_new_process(families, train, elsewhere, tmp_path):
    """peft alone does not know the tuner there; `perpetune.load_adapter` does."""
    family, expected, folders = families["bert"], [], []
    for config in (PrefixConfig, DeepPromptConfig):
        model = _trained(config, family, train)
        model.save_pretrained(tmp_path / config.__name__)
        expected.append(str(_hidden(model, family)))
        folders.append(str(tmp_path / config.__name__ / "task_0001"))
    path = [str(Path(__file__).parent), str(Path(perpetune.__file__).parents[1])]
    code = inspect.getsource(_hidden).replace(": Any", "") + ELSEWHERE.format(path=path, folders=folders)
    missing = ["KeyError 'perpetune_prefix'", "KeyError 'perpetune_prompt'"]
    assert elsewhere(code).splitlines() == missing + expected


@pytest.mark.real
def test_minilm(config, minilm):
    """Texts of two lengths in a batch equal each alone; 6 layers of 12 heads offer their maps."""
    model = AutoModel.from_pretrained(minilm, add_pooling_layer=False)
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    tuned = peft.get_peft_model(model, config()).eval()
    texts = ["a film that everybody liked", "bad"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        together = tuned(**batch).last_hidden_state
        for i, text in enumerate(texts):
            alone = tuned(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            torch.testing.assert_close(together[i, : len(alone)], alone, rtol=0, atol=1e-5)
        with tuned.disable_adapter():
            assert (tuned(**batch).last_hidden_state - together)[0].abs().max() > 1e-2
    maps = maps_of(tuned)
    assert len(maps) == 6 * (24 if config is PrefixConfig else 2)
    rows = rows_read(maps, lambda: tuned(**batch))
    assert all(X.shape[-1] == m.width and X.isfinite().all() for m, X in zip(maps, rows, strict=True))
