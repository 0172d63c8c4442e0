"""What was trained elsewhere is the first task of a run: the model is what it was, rules know it, or say that not."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_keep import keep_week
from transformers import AutoModelForCausalLM

import perpetune as pt
from perpetune.cli import app
from perpetune.core.errors import ConfigError, ModelError, RunError
from perpetune.core.progress import Progress
from perpetune.learning.adopted_files import check_base
from perpetune.operations.gate import judge
from perpetune.runs.result import Result

PAIRS = [("good movie", "great film"), ("bad game", "awful team"), ("the market", "business news")]


@pytest.fixture(scope="module")
def base(tiny_lm):
    return tiny_lm("llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A sample of what was trained on, and a week to be learned after it."""
    folder = tmp_path_factory.mktemp("data")
    for place in ("old", "new/week-2"):
        (folder / place).mkdir(parents=True)
        for split in ("train", "test"):
            lines = [json.dumps({"prompt": f"{p} {place[:3]}", "response": r}) for p, r in PAIRS]
            (folder / place / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def plain(base):
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


@pytest.fixture
def adapter(base, tmp_path):
    """`adapter(r=8, ...)`: the folder of a LoRA that somebody trained, and the model with it merged."""

    def make(**settings):
        lora = {"r": 8, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"], **settings}
        tuned = peft.get_peft_model(plain(base), peft.LoraConfig(**lora))
        with torch.no_grad():
            for i, (name, p) in enumerate(tuned.named_parameters()):
                if "lora_B" in name:
                    p.copy_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
        tuned.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter", tuned.merge_and_unload()

    return make


def furthest(ours, theirs):
    assert ours.keys() == theirs.keys()
    return max(float((ours[k] - theirs[k]).abs().max()) for k in ours)


def weights(learner):
    return pt.Learner.open(learner.path, device="cpu").export(learner.path.parent / "export")


@pytest.mark.parametrize("recipe", ["lora", "olora", "olora_released", "sequential_lora"])
def test_the_model_is_what_it_was_and_goes_on(base, adapter, data, recipe, tmp_path):
    folder, expected = adapter()
    given = {"name": recipe, "dropout": 0.0} if recipe == "olora_released" else recipe
    learner = pt.Learner.adopt(folder, base, tmp_path / "run", recipe=given, device="cpu")
    stored = Result(tmp_path / "run").commits[1]
    theirs = load_file(folder / "adapter_model.safetensors")
    assert furthest(stored.tensors("adapter_model.safetensors"), theirs) == 0
    exported = AutoModelForCausalLM.from_pretrained(weights(learner))
    assert 0 < furthest(expected.state_dict(), plain(base).state_dict()) > 0.01
    assert furthest(exported.state_dict(), expected.state_dict()) < 1e-6
    stream, training = pt.load_stream(data / "new", metric="exact_match"), {"max_steps": 2, "learning_rate": 3e-3}
    result = pt.Learner(base, given, tmp_path / "run", training=training, device="cpu").learn(stream)
    assert result.tasks == ("adopted", "week-2") and result.config["training"]["learning_rate"] == 3e-3
    with pytest.raises(RunError, match="training.learning_rate"):  # now that it has trained something
        pt.Learner(base, given, tmp_path / "run", training={**training, "learning_rate": 1e-3}).learn(stream)
    assert pt.Learner.described(tmp_path / "run", device="cpu").learn(stream).tasks == result.tasks


def test_a_trainer_of_ones_own_goes_on(base, adapter, tmp_path):
    """Without saying the recipe again, which has the adapter's settings."""
    folder, expected = adapter(r=4)
    pt.Learner.adopt(folder, base, tmp_path / "run", recipe="olora", device="cpu")
    keep_week(base, tmp_path / "run", "week-2", tmp_path / "out", None)
    result = Result(tmp_path / "run")
    assert result.tasks == ("adopted", "week-2") and "week-2" in result.summary()
    only = pt.Learner.open(tmp_path / "run", device="cpu").export(tmp_path / "export", only=["adopted"])
    assert furthest(AutoModelForCausalLM.from_pretrained(only).state_dict(), expected.state_dict()) < 1e-6


def test_other_settings_are_taken_on(base, adapter, tmp_path):
    """Rank and targets as settings of the recipe; what it has no setting for as its configuration."""
    folder, _ = adapter(r=4, lora_alpha=8, target_modules=["k_proj", "o_proj", "down_proj"])
    named = pt.Learner.adopt(folder, base, tmp_path / "named", recipe="nlora", device="cpu").recipe
    own = {"name": "nlora", "rank": 4, "alpha": 8, "target": ["down_proj", "k_proj", "o_proj"]}
    assert named.to_dict()["tuner"] == pt.make_recipe(own).to_dict()["tuner"]
    assert [type(rule).__name__ for rule in named.rules] == ["ProductL1"]
    folder, expected = adapter(use_rslora=True)
    learner = pt.Learner.adopt(folder, base, tmp_path / "rs", recipe="olora", device="cpu")
    assert learner.recipe.tuner.config.use_rslora
    exported = AutoModelForCausalLM.from_pretrained(weights(learner))
    assert furthest(exported.state_dict(), expected.state_dict()) < 1e-6


def test_rules_remember_its_inputs_or_say_that_they_cannot(base, adapter, data, tmp_path):
    folder, _ = adapter()
    pt.Learner.adopt(folder, base, tmp_path / "blind", recipe="pegp_lora_fresh", device="cpu")
    blind = Result(tmp_path / "blind").commits[1]
    assert not blind.has("rules.safetensors")
    assert "SubspaceProjection does not know the inputs of `adopted`" in blind.manifest["adopted"]["unknown"][0]
    old = data / "old"
    learner = pt.Learner.adopt(folder, base, tmp_path / "run", recipe="pegp_lora_fresh", data=old, device="cpu")
    known = Result(tmp_path / "run").commits[1]
    assert known.has("rules.safetensors") and known.manifest["adopted"]["unknown"] == []
    scores = Result(tmp_path / "run").scores(*Result(tmp_path / "run").readings[0])
    assert len(scores[0]["adopted"]) == 3
    rows = pt.load_stream(old.parent, tasks=["old"], metric="exact_match").tasks[0].train

    def likelihoods(learner):
        return learner.backbone.responses(learner.backbone.prepare(rows), 4)[:, 0]

    then, moved = likelihoods(learner), {}
    for run in ("run", "blind"):
        pt.Learner.described(tmp_path / run, device="cpu").learn(pt.load_stream(data / "new", metric="exact_match"))
        moved[run] = float((likelihoods(pt.Learner.open(tmp_path / run, device="cpu")) - then).abs().max())
    assert 0 < moved["run"] < moved["blind"] / 2
    blind = pt.Learner.adopt(folder, base, tmp_path / "o", recipe="olora", device="cpu")  # remembers the adapter alone
    assert Result(tmp_path / "o").commits[1].manifest["adopted"]["unknown"] == []
    state = Result(tmp_path / "o").commits[1].tensors("rules.safetensors")
    A = load_file(folder / "adapter_model.safetensors")
    assert any(torch.equal(a, s) for a in A.values() for s in state.values() if a.shape == s.shape)


def test_a_tuned_model_is_a_delta(base, tmp_path):
    tuned = plain(base)
    with torch.no_grad():
        tuned.model.layers[0].mlp.up_proj.weight.add_(0.1)
    tuned.save_pretrained(tmp_path / "tuned")
    for file in base.glob("tokenizer*"):
        (tmp_path / "tuned" / file.name).write_bytes(file.read_bytes())
    learner = pt.Learner.adopt(tmp_path / "tuned", base, tmp_path / "run", device="cpu")
    exported = AutoModelForCausalLM.from_pretrained(weights(learner))
    assert furthest(exported.state_dict(), tuned.state_dict()) < 1e-6
    with pytest.raises(ConfigError, match="keeps adapters"):
        pt.Learner.adopt(tmp_path / "tuned", base, tmp_path / "other", recipe="lora", device="cpu")
    tuned.resize_token_embeddings(tuned.config.vocab_size + 3)
    tuned.save_pretrained(tmp_path / "tuned")
    with pytest.raises(ModelError, match="resize the base's embeddings"):
        pt.Learner.adopt(tmp_path / "tuned", base, tmp_path / "other", device="cpu")


def test_what_does_not_fit_is_refused(base, adapter, tmp_path):
    def refused(error, match, folder, recipe="olora", **more):
        with pytest.raises(error, match=match) as found:
            pt.Learner.adopt(folder, base, tmp_path / "run", recipe=recipe, device="cpu", **more)
        assert "\n" not in str(found.value)

    def changed(**settings):
        path = folder / "adapter_config.json"
        written = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**written, **settings}), encoding="utf-8")

    folder, _ = adapter()
    tensors = load_file(folder / "adapter_model.safetensors")
    refused(ModelError, "neither a peft adapter", tmp_path)
    refused(ConfigError, "trains no LoRA", folder, "sotu")
    refused(ConfigError, "give a sample of the data", folder, "routed")
    changed(base_model_name_or_path="some/other-7b")
    refused(ModelError, "was trained on `some/other-7b`", folder)
    pt.Learner.adopt(folder, base, tmp_path / "same", same_base=True, device="cpu")
    changed(base_model_name_or_path=str(base), modules_to_save=["lm_head"])
    refused(ModelError, "whole modules beside its LoRA", folder)
    changed(modules_to_save=None, target_modules=["query_key_value"])
    refused(ModelError, "query_key_value", folder)
    changed(target_modules=["q_proj", "v_proj"])
    more = {**tensors, "base_model.model.model.embed_tokens.weight": torch.zeros(3, 32)}
    save_file(more, folder / "adapter_model.safetensors")
    refused(ModelError, "tokens were added", folder)
    deeper = {k.replace("layers.1", "layers.7"): v for k, v in tensors.items()}
    save_file(deeper, folder / "adapter_model.safetensors")
    refused(ModelError, "of another model", folder)
    wider = {k: torch.cat([v, v], 1) if "lora_A" in k else v for k, v in tensors.items()}
    save_file(wider, folder / "adapter_model.safetensors")
    refused(ModelError, "has the shapes", folder)
    (folder / "adapter_model.safetensors").write_bytes(b"x")
    refused(ModelError, "is damaged", folder)
    (folder / "adapter_model.safetensors").unlink()
    refused(ModelError, "has no adapter_model.safetensors", folder)
    assert Result(tmp_path / "same").tasks == ("adopted",)
    folder, _ = adapter()
    with pytest.raises(RunError, match="begins a run"):
        pt.Learner.adopt(folder, base, tmp_path / "same", device="cpu")


def test_the_command_line(base, adapter, data, tmp_path, monkeypatch, capsys):
    folder, _ = adapter(r=4)
    out = str(tmp_path / "run")

    def call(*words):
        with pytest.raises(SystemExit) as stop:
            app.main([*map(str, words)])
        return stop.value.code, capsys.readouterr()

    code, said = call("adopt", folder, "--model", base, "--recipe", "olora", "--data", data / "old", "--out", out)
    assert code == 0 and "go on with `perpetune run" in said.out, said
    week = ("run", "--stream", data / "new", "--metric", "exact_match", "--out", out)
    code, said = call(*week, "--set", "max_steps=2")  # with the run's own model and recipe
    assert code == 0, said
    assert Result(out).tasks == ("adopted", "week-2") and Result(out).config["training"]["max_steps"] == 2
    code, said = call(*week, "--set", "max_steps=3")
    assert code == 2 and "max_steps was 2, now it is 3" in said.err and "with --retry TASK" in said.err


def test_the_folder_of_a_gguf_file_is_its_base(tmp_path):
    """Which is what peft writes down of a model that was loaded from one."""
    (tmp_path / "model").mkdir()
    trained = peft.LoraConfig(base_model_name_or_path=str(tmp_path / "model"))
    check_base(trained, str(tmp_path / "model" / "model.Q4_1.gguf"), tmp_path)
    with pytest.raises(ModelError, match="same-base"):
        check_base(trained, str(tmp_path / "other" / "model.Q4_1.gguf"), tmp_path)


def test_the_adopted_task_is_judged_where_its_data_stands_in_the_stream(base, adapter, data, tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(Progress, "say", lambda self, text: said.append(text))  # which `pt.Learner` shows nowhere
    folder, _ = adapter(r=4)
    weeks = tmp_path / "weeks"
    (weeks / "week-2").mkdir(parents=True)
    lines = [json.dumps({"prompt": f"the game {i}", "response": f"a good film of band {i}"}) for i in range(8)]
    for split in ("train", "test"):
        (weeks / "week-2" / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    runs = [tmp_path / "alone", tmp_path / "whole"]
    for run in runs:
        pt.Learner.adopt(folder, base, run, task="week-1", data=data / "old", recipe="olora", device="cpu")
    assert any("task 1 `week-1` adopted in" in line for line in said)

    def learn(run, **more):
        stream = pt.load_stream(weeks, **{"metric": "exact_match", **more})
        recipe, training = pt.Learner.described(run).recipe, {"max_steps": 2}
        return pt.Learner(base, recipe, run, training=training, device="cpu").learn(stream)

    with pytest.raises(ConfigError, match="different responses.*--metric"):
        learn(runs[0], metric=None)
    result = learn(runs[0])
    assert judge(result, min_gain=-1).unjudged
    assert any("as week-1/test.jsonl" in line for line in said) and not any("is gone" in line for line in said)
    shutil.copytree(data / "old", weeks / "week-1")
    result = learn(runs[1])
    verdict = judge(result, min_gain=-1, max_forgetting=1)
    assert result.tasks == ("week-1", "week-2") and verdict.passed and not verdict.unjudged


def test_a_week_of_chats_is_gated_and_served(tiny_lm, adapter, tmp_path, monkeypatch, capsys):
    folder, _ = adapter(r=4)  # of the model of these tests, without data
    base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    monkeypatch.chdir(tmp_path)

    def call(*words):
        with pytest.raises(SystemExit) as stop:
            app.main([*map(str, words)])
        return stop.value.code, capsys.readouterr()

    assert call("adopt", folder, "--model", base, "--out", "weekly")[0] == 0
    code, said = call("gate", "weekly")
    assert code == 2 and "no task that it has learned has test data" in said.err
    for split in ("train", "test"):
        (tmp_path / "weeks" / "2026-w49").mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"prompt": p, "response": r}) for p, r in PAIRS]
        (tmp_path / "weeks" / "2026-w49" / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    limits = ("--gate", "--min-gain", 0, "--max-loss-increase", 0.1)
    week = ("run", "--stream", "weeks", "--metric", "token_f1", "--out", "weekly", "--set", "max_steps=2")
    code, said = call(*week, *limits)
    assert code == 0, said
    assert call("export", "weekly", "--format", "adapters", "--out", "adapters")[0] == 0
    code, said = call("serve-config", "weekly", "--folder", "adapters")
    assert code == 0 and "vllm serve" in said.out and "all=" in said.out
