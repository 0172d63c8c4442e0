"""Adapters of an export answer as the run does, loaded by plain peft where perpetune cannot be imported."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file

import perpetune as pt
from perpetune.learning.lora_factors import Factors, found_factors, joined

TRAINING = {"max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 2e-2}
TASKS = ["films", "news", "mood"]
LORA = {"r": 2, "lora_alpha": 6, "target_modules": "query_value"}
# arguments: the export, a file with inputs. Every adapter, by its name, onto the base of its own configuration.
ANSWER = """
import json, sys
sys.modules["perpetune"] = None
import torch
from pathlib import Path
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM
folder, given = Path(sys.argv[1]), load_file(sys.argv[2])
routes = json.loads((folder / "routes.json").read_text(encoding="utf-8"))
model, found = None, {}
for each in routes["adapters"]:
    name, path = each["name"], str(folder / each["folder"])
    config = PeftConfig.from_pretrained(path)
    if model is None:
        kind = AutoModelForCausalLM if config.task_type == "CAUSAL_LM" else AutoModel
        base = kind.from_pretrained(config.base_model_name_or_path, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, path, adapter_name=name).eval()
    else:
        model.load_adapter(path, name)
for each in routes["adapters"]:
    model.set_adapter(each["name"])
    with torch.no_grad():
        output = model(**given)
    found[each["name"]] = output.logits if hasattr(output, "logits") else output.last_hidden_state
found["base"] = None
with torch.no_grad(), model.disable_adapter():
    output = model(**given)
found["base"] = output.logits if hasattr(output, "logits") else output.last_hidden_state
save_file({k: v.contiguous() for k, v in found.items()}, sys.argv[3])
"""


@pytest.fixture(scope="module")
def stream(word_stream):
    return pt.load_stream(word_stream, tasks=TASKS, train_limit=16, test_limit=8)


@pytest.fixture(scope="module")
def prompts(word_stream):
    return pt.load_stream(word_stream, tasks=TASKS, pose="instruction", train_limit=8, test_limit=4)


@pytest.fixture(scope="module")
def small(tiny_bert):
    return tiny_bert(width=16, layers=1)


def learned(model, stream, path, recipe):
    learner = pt.Learner(model, recipe, path, training=TRAINING, evaluate_every=0)
    learner.learn(stream)
    return learner


def answered(elsewhere, folder, inputs, tmp_path):
    """What each adapter of a folder makes of these inputs, in a process of its own without perpetune."""
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in inputs.items()}, tmp_path / "given")
    elsewhere(ANSWER, folder, tmp_path / "given", tmp_path / "found")
    return load_file(tmp_path / "found")


def outputs(model, inputs):
    with torch.no_grad():
        output = model.eval()(**inputs)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def inputs_of(learner, task):
    batch = learner.backbone.batch(learner.backbone.prepare(task.test))
    return {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "token_type_ids")}


def close(a, b):
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_every_task_has_its_adapter(kind, stream, prompts, tiny_lm, tiny_bert, elsewhere, tmp_path):
    model, data = (tiny_lm("llama"), prompts) if kind == "llama" else (tiny_bert(), stream)
    learner = learned(model, data, tmp_path / "r", "color")
    folder = learner.export(tmp_path / "a", format="adapters")
    inputs = inputs_of(learner, data.tasks[0])
    found = answered(elsewhere, folder, inputs, tmp_path)
    assert set(found) == {*TASKS, "base"}
    with learner.recipe.consolidation.view(None):
        assert close(found["base"], outputs(learner.backbone.model, inputs))
    for index, task in enumerate(TASKS):
        with learner.recipe.consolidation.view(index):
            assert close(found[task], outputs(learner.backbone.model, inputs)), task
        assert not close(found[task], found["base"])
    told = json.loads((folder / "routes.json").read_text(encoding="utf-8"))
    assert [each["tasks"] for each in told["adapters"]] == [[task] for task in TASKS]
    assert [each["labels"] for each in told["adapters"]] == [list(data.label_texts(t.classes)) for t in data]
    for commit, each in zip(sorted((tmp_path / "r" / "commits").iterdir())[1:], told["adapters"], strict=True):
        one, other = (load_file(f / "adapter_model.safetensors") for f in (commit, folder / each["folder"]))
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)  # not a bit is changed


def onto_base(learner, folder, name="all"):
    """The base model with an adapter of an export, by plain peft."""
    base, _ = learner.fresh()
    return peft.PeftModel.from_pretrained(base.model, folder / name, adapter_name=name)


def lora(consolidation, **settings):
    return pt.Recipe(peft.LoraConfig(**{**LORA, **settings}), [], consolidation)


RECIPES = {
    "merge": (lambda: lora(pt.Merge()), 6),  # three tasks of rank 2
    "stack": (lambda: lora(pt.Stack()), 6),
    "continue": (lambda: lora(pt.Continue()), 2),
    "rslora": (lambda: lora(pt.Merge(), use_rslora=True), 6),
    "patterns": (lambda: lora(pt.Continue(), rank_pattern={"value": 4}, alpha_pattern={"value": 2}), 4),
    "pissa": (lambda: lora(pt.Continue(), init_lora_weights="pissa"), 4),  # what it takes out of the base is of rank 2
    "loha": (lambda: pt.Recipe(peft.LoHaConfig(r=2, target_modules="query_value"), [], pt.Continue()), 4),
    "vera": (lambda: pt.Recipe(peft.VeraConfig(r=3, target_modules="query_value"), [], pt.Continue()), 3),
}


@pytest.mark.parametrize("name", RECIPES)
def test_one_adapter_for_the_model_after_all_tasks(name, stream, small, tmp_path):
    recipe, rank = RECIPES[name]
    learner = learned(small, stream, tmp_path / "r", recipe())
    inputs = inputs_of(learner, stream.tasks[0])
    folder = learner.export(tmp_path / "a", format="adapters")
    model = onto_base(learner, folder)
    assert close(outputs(model, inputs), outputs(learner.backbone.model, inputs))
    config = json.loads((folder / "all" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["r"] == rank and isinstance(config["lora_alpha"], int)
    assert (config["bias"], config["modules_to_save"], config["use_dora"]) == ("none", None, False)
    told = json.loads((folder / "routes.json").read_text(encoding="utf-8"))
    assert told["adapters"][0]["tasks"] == TASKS and told["router"] is None
    assert load_file(folder / "all" / "classifier.safetensors")["weight"].shape == (6, 16)
    # vLLM multiplies by alpha / r of the whole, whatever the patterns say
    for key, A in load_file(folder / "all" / "adapter_model.safetensors").items():
        if key.endswith("lora_A.weight"):
            layer = model.get_submodule(key.removesuffix(".lora_A.weight"))
            assert layer.scaling["all"] == pytest.approx(config["lora_alpha"] / config["r"]) and len(A) <= rank


def test_tasks_are_chosen_scaled_and_accumulated(stream, small, tmp_path):
    learner = learned(small, stream, tmp_path / "r", lora(pt.Merge()))
    inputs = inputs_of(learner, stream.tasks[0])
    choice = {"without": ["news"], "scales": {"mood": 0.5}}
    chosen = onto_base(learner, learner.export(tmp_path / "a", format="adapters", **choice))
    from transformers import AutoModel

    plain = AutoModel.from_pretrained(learner.export(tmp_path / "m", **choice), add_pooling_layer=False)
    assert close(outputs(chosen, inputs), outputs(plain, inputs))
    card = (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    assert "films, 0.5 x mood" in card and "of the run with all tasks" in card and "classifier.safetensors" not in card
    folder = learner.export(tmp_path / "a", format="adapters", cumulative=True)
    assert {p.name for p in folder.iterdir() if p.is_dir()} == {"after-films", "after-news", "all"}
    for name, tasks in (("after-films", TASKS[:1]), ("after-news", TASKS[:2]), ("all", TASKS)):
        plain = AutoModel.from_pretrained(learner.export(tmp_path / "m", only=tasks), add_pooling_layer=False)
        assert close(outputs(onto_base(learner, folder, name), inputs), outputs(plain, inputs))
    learner.export(tmp_path / "a", format="adapters")
    assert {p.name for p in folder.iterdir() if p.is_dir()} == {"all"}  # those of an earlier export are gone
    assert load_file(folder / "all" / "adapter_model.safetensors")  # and half precision is a choice
    half = load_file(
        learner.export(tmp_path / "h", format="adapters", dtype="bfloat16") / "all/adapter_model.safetensors"
    )
    assert {t.dtype for t in half.values()} == {torch.bfloat16}


def test_what_no_lora_could_be_is_refused_in_a_line(stream, small, tmp_path):
    from perpetune.tuners.adapter import AdapterConfig

    ia3 = peft.IA3Config(target_modules=["key", "value"], feedforward_modules=[])
    oft = peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False, target_modules=["query"])
    whole = lora(pt.Continue(), target_modules=["query"], modules_to_save=["value"])
    one = pt.load_stream(stream.source["source"], tasks=["films"], train_limit=8, test_limit=2)
    for name, recipe, message in (
        ("ia3", pt.Recipe(ia3, [], pt.PerTask()), r"is IA3.*rank 16.*--format merged --only TASK"),
        ("oft", pt.Recipe(oft, [], pt.Merge()), r"is OFT.*--format merged$"),
        ("dora", lora(pt.Continue(), use_dora=True), r"has use_dora.*rank 16.*--format merged$"),
        ("whole", whole, r"has modules_to_save.*--format merged$"),
        ("bias", lora(pt.Continue(), bias="lora_only"), r"has bias=lora_only and changes .*bias`.*--format merged$"),
        ("adapter", pt.Recipe(AdapterConfig(bottleneck=2), [], pt.Continue()), r"no plain model of a AdapterConfig"),
        ("sotu", "sotu", r"DeltaMerge leaves no adapters.*--format merged"),
    ):
        learner = learned(small, one, tmp_path / name, recipe)
        with pytest.raises(pt.ConfigError, match=message) as refused:
            learner.export(tmp_path / "a", format="adapters")
        assert "\n" not in str(refused.value) and not (tmp_path / "a").exists()


def test_choices_that_make_no_sense_are_refused(stream, small, tmp_path):
    learner = learned(small, stream, tmp_path / "r", "color")
    for settings, message in (
        ({"format": "adapters", "cumulative": True}, "none that accumulates"),
        ({"format": "adapters", "scales": {"news": 2}}, "a scale would spoil"),
        ({"format": "gguf"}, "merged or adapters, not `gguf`"),
        ({"cumulative": True}, "goes with adapters"),
        ({"format": "adapters", "head": "ridg"}, "no head `ridg`"),
        ({"format": "adapters", "only": ["new"]}, "did you mean `news`"),
    ):
        with pytest.raises(pt.ConfigError, match=message):
            learner.export(tmp_path / "a", **settings)
    told = json.loads((learner.export(tmp_path / "a", format="adapters", only=["news"]) / "routes.json").read_text())
    assert [each["name"] for each in told["adapters"]] == ["news"] and "name the adapter" in told["router"]["how"]
    assert told["router"]["how"] in (card := (tmp_path / "a" / "README.md").read_text()) and "says which" not in card
    assert not (tmp_path / "a" / "router.safetensors").exists()


def test_a_head_is_chosen_by_its_name(stream, small, tmp_path):
    """The scores of a task are those of the rows that it had when it ended."""
    recipe = lora(pt.PerTask()).with_heads([pt.LinearHead(), pt.PrototypeHead()])
    learner = learned(small, stream, tmp_path / "r", recipe)
    text = stream.tasks[1].test["text"][:3]
    for name in ("linear", "ncm"):
        folder = learner.export(tmp_path / name, format="adapters", head=name)
        head = load_file(folder / "news" / "classifier.safetensors")
        about = json.loads((folder / "news" / "classifier.json").read_text(encoding="utf-8"))
        examples = learner.backbone.prepare(stream.tasks[1].test.select(range(3)))
        with learner.recipe.consolidation.view(1):
            features = learner.backbone.features(examples, 8)
        features = torch.nn.functional.normalize(features, dim=1) if about["normalised"] else features
        best = (features @ head["weight"].T + head["bias"]).argmax(1)
        assert [about["labels"][i] for i in best] == learner.predict(text, head=name, task="news")
    assert not (learner.export(tmp_path / "none", format="adapters", head=False) / "news" / "classifier.json").exists()


@pytest.mark.parametrize("kind", ["bfloat16", "nf4"])
def test_a_model_in_memory_of_low_precision_gives_its_adapters_away(kind, prompts, tiny_lm, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    folder, more = tiny_lm("llama", width=64, layers=1), {}
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
        more = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")}
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **more)
    given = (base, AutoTokenizer.from_pretrained(folder))
    learner = learned(given, prompts, tmp_path / "run", {"name": "lora", "rank": 2})
    learner.export(tmp_path / "adapters", format="adapters")
    routes = json.loads((tmp_path / "adapters" / "routes.json").read_text(encoding="utf-8"))
    assert [each["name"] for each in routes["adapters"]] == ["all"]
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    with torch.no_grad():
        before, ours = base(**inputs).logits, learner.backbone.model(**inputs).logits
        plain = copy.deepcopy(base)
        theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "adapters" / "all").eval()(**inputs).logits
    assert relative(theirs, ours) < 0.02 < relative(before, ours)  # to the rounding of bf16
    learner.export(tmp_path / "whole")  # merged in fp32
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    with torch.no_grad():
        assert relative(whole(**inputs).logits, ours) < 0.02


def relative(a, b):
    return float((a.float() - b.float()).norm() / b.float().norm())


def test_factors_are_joined_without_rounding_where_scales_agree():
    draw = torch.Generator().manual_seed(0)
    one, other = (Factors(torch.randn(2, 8, generator=draw), torch.randn(6, 2, generator=draw), 3.0) for _ in range(2))
    both = joined([({"x": one}, 1.0), ({"x": other, "y": other}, 1.0)])
    assert (both["x"].scale, both["x"].rank, both["y"].rank) == (3.0, 4, 2)
    assert torch.equal(both["x"].A[:2], one.A) and torch.equal(both["x"].B[:, 2:], other.B)
    expected = 3 * one.B @ one.A - 1.5 * other.B @ other.A
    mixed = joined([({"x": one}, 1.0), ({"x": other}, -0.5)])["x"]
    assert mixed.scale == 1 and torch.allclose(mixed.B @ mixed.A, expected, atol=1e-5)


def test_a_difference_of_small_rank_is_found_to_rounding():
    draw = torch.Generator().manual_seed(0)
    old, new = (torch.nn.ModuleDict({"a": torch.nn.Linear(40, 30), "e": torch.nn.Embedding(50, 20)}) for _ in range(2))
    new.load_state_dict(old.state_dict())
    low = 1e-2 * torch.randn(30, 3, generator=draw) @ torch.randn(3, 40, generator=draw)
    with torch.no_grad():
        new["a"].weight += low
        new["e"].weight += 1e-2 * torch.outer(torch.randn(50, generator=draw), torch.randn(20, generator=draw))
    found = found_factors(new, old)
    assert {name: (f.rank, f.embedding) for name, f in found.items()} == {"a": (3, False), "e": (1, True)}
    assert torch.allclose(found["a"].B @ found["a"].A, low, atol=1e-6)
    assert torch.allclose((found["e"].B @ found["e"].A).T, new["e"].weight - old["e"].weight, atol=1e-6)
    with torch.no_grad():
        new["a"].bias += 1
    assert found_factors(new, old) == "changes `a.bias`"
