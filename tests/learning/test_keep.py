"""A recipe in somebody else's trainer: what it leaves is what `Learner` would have left, or nothing at all."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import datasets
import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

import perpetune as pt
from perpetune.core.errors import ConfigError, ModelError, RuleError, RunError, TrainingError
from perpetune.learning.keep_checks import check_trainer
from perpetune.operations.gate import judge
from perpetune.runs.result import Result
from perpetune.streams import load_again

WEEKS = {
    "week-1": [("good movie", "great film"), ("bad game", "awful team"), ("the market", "business news")],
    "week-2": [("sport team", "the game"), ("world science", "a film"), ("great market", "bad business")],
}
TRAINING = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "learning_rate": 5e-3,
    "weight_decay": 0.0,
    "train_sampling_strategy": "sequential",
}
QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "seed": 0}


@pytest.fixture(scope="module")
def base(tiny_lm):
    return tiny_lm("llama", ends=True, layers=1)


@pytest.fixture(scope="module")
def weeks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weeks")
    for week, pairs in WEEKS.items():
        (folder / week).mkdir()
        for split in ("train", "test"):
            lines = [json.dumps({"prompt": p, "response": r}) for p, r in pairs]
            (folder / week / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return pt.load_stream(folder, metric="exact_match")


def learner(base, run, recipe):
    return pt.Learner(base, recipe, run, training=dict(TRAINING), device="cpu")


def tokens(base, week):
    """The rows of a week, as `Learner` reads them."""
    pieces = pt.Learner(base, "lora", device="cpu").setup.load_backbone("language")
    pieces.open((), ())
    pieces.tokens.prefix = ""  # as a run that begins now: nothing stands between prompt and response
    rows = datasets.Dataset.from_dict(
        {
            "prompt": [p for p, _ in WEEKS[week]],
            "response": [r for _, r in WEEKS[week]],
            "label": [-1] * 3,
            "id": ["x"] * 3,
        }
    )
    found = []
    for e in pieces.prepare(rows):
        ids = [*e["input_ids"], *e["answer"]]
        labels = [-100] * len(e["input_ids"]) + list(e["answer"])
        found.append({"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)})
    return found


def collate(rows):
    longest = max(len(r["input_ids"]) for r in rows)
    pads = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {k: torch.tensor([r[k] + [pad] * (longest - len(r[k])) for r in rows]) for k, pad in pads.items()}


def trainer_for(base, week, callback, out, *, adapter=None, tests=True, kind=Trainer, model=None, first=(), **more):
    """A trainer as a user has it, in a process of its own as far as weights go."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = model if model is not None else AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = peft.get_peft_model(model, adapter)
    rows = datasets.Dataset.from_list(tokens(base, week))
    settings = {k: v for k, v in TRAINING.items()} | QUIET | {"output_dir": str(out)} | more
    optimizers = settings.pop("optimizers", (None, None))
    if kind is Trainer:
        arguments, extra = TrainingArguments(**settings), {"data_collator": collate}
    else:
        import trl

        arguments, extra = trl.SFTConfig(bf16=False, **settings), {}
    callbacks = [*first, *([callback] if callback is not None else [])]
    return kind(
        model=model, args=arguments, train_dataset=rows, eval_dataset=rows if tests else None,
        processing_class=tokenizer, callbacks=callbacks, optimizers=optimizers, **extra,
    )  # fmt: skip


def keep_week(base, run, week, out, recipe="olora", **more):
    trainer = trainer_for(base, week, pt.Keep(recipe, run=run, task=week), out, **more)
    trainer.train()
    return trainer


def second_process(base, folder):
    import trl

    torch.set_num_threads(1)
    keep_week(base, Path(folder) / "kept", "week-2", Path(folder) / "out", kind=trl.SFTTrainer)


def adapter_of(commit):
    return commit.tensors("adapter_model.safetensors")


def furthest(ours, theirs):
    """The largest difference, as a share of the largest value."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[k] - theirs[k]).abs().max() / theirs[k].abs().max()) for k in ours)


@pytest.mark.parametrize(
    "recipe",
    ["lora", "olora", "sequential_lora", "pegp_lora_fresh"],
)
def test_two_processes_end_with_the_weights_of_the_learner(base, weeks, recipe, elsewhere, tmp_path):
    """To rounding: one pads on the left, the other on the right. Trainings take up to 1e-5 of the largest weight."""
    kind = Trainer
    if recipe in ("olora", "pegp_lora_fresh"):
        kind = pytest.importorskip("trl", reason="TRL is not installed: pip install trl").SFTTrainer
    ours = learner(base, tmp_path / "learner", recipe)
    ours.learn(weeks)
    keep_week(base, tmp_path / "kept", "week-1", tmp_path / "out", recipe, kind=kind)
    if recipe == "olora":
        path = [str(Path(__file__).parent), *sys.path]
        code = f"import sys; sys.path[:] = {path!r}; import test_keep; test_keep.second_process(*sys.argv[1:])"
        elsewhere(code, base, tmp_path)
    else:
        keep_week(base, tmp_path / "kept", "week-2", tmp_path / "out", recipe, kind=kind)
    expected, found = Result(tmp_path / "learner"), Result(tmp_path / "kept")
    assert found.tasks == expected.tasks == tuple(WEEKS)
    for a, b in zip(found.commits[1:], expected.commits[1:], strict=True):
        assert furthest(adapter_of(a), adapter_of(b)) < 1e-4
        assert a.has("rules.safetensors") == b.has("rules.safetensors")
    opened = pt.Learner.open(tmp_path / "kept", device="cpu")
    theirs = pt.Learner.open(tmp_path / "learner", device="cpu")
    a, b = opened.backbone.model.state_dict(), theirs.backbone.model.state_dict()
    assert furthest(a, b) < 1e-4
    prompts = [p for p, _ in WEEKS["week-1"]]
    assert opened.predict(prompts) == theirs.predict(prompts)


def test_a_run_is_opened_exported_judged_and_reverted(base, tmp_path):
    """As any run; and the scores are those of the eval_dataset before and after."""
    run = tmp_path / "run"
    keep_week(base, run, "week-1", tmp_path / "out")
    first = pt.Learner.open(run, device="cpu")
    rows = tokens(base, "week-1")
    both = {name: data for name, data in (("week-1", rows), ("week-2", tokens(base, "week-2")))}
    trainer = trainer_for(base, "week-2", pt.Keep("olora", run=run, task="week-2"), tmp_path / "out")
    trainer.eval_dataset = {name: datasets.Dataset.from_list(r) for name, r in both.items()}
    trainer.eval_dataset["other"] = trainer.eval_dataset["week-1"]
    trainer.train()
    result = Result(run)
    assert result.tasks == ("week-1", "week-2")
    scores = result.scores("likelihood", "domain")
    assert {*scores[1]} == {"week-1", "week-2"} and {*scores[0]} == {"week-1", "week-2"}

    def likelihood(model, row):
        batch = collate([row])
        with torch.no_grad():
            return float(torch.exp(-model(**batch).loss))

    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    untouched = [likelihood(plain, row) for row in rows]
    assert result.baseline("score/likelihood", "domain")["week-1"] == pytest.approx(untouched, rel=1e-4)
    after = [likelihood(first.backbone.model.eval(), row) for row in rows]
    assert scores[0]["week-1"] == pytest.approx(after, rel=1e-4)
    assert sum(after) > sum(untouched)
    opened = pt.Learner.open(run, device="cpu")
    folder = opened.export(tmp_path / "export")
    exported = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert scores[1]["week-1"] == pytest.approx([likelihood(exported, row) for row in rows], rel=1e-4)
    assert furthest(exported.state_dict(), trainer.model.state_dict()) < 1e-6
    said = result.commits[2].manifest["trainer"]
    assert said["left_out"] == ["eval_dataset `other`: it is called as no task"]
    assert said["settings"]["learning_rate"] == 5e-3
    assert "week-1" in result.summary()
    verdict = judge(result, max_forgetting=1.0, min_gain=-1.0, max_loss_increase=100.0)
    assert [t.name for t in verdict.tasks] == ["week-1"] and not verdict.failures
    assert judge(result, max_forgetting=-1.0, min_gain=1.0).failures
    after = opened.revert(load_again(result.config["stream"], ["week-1"], learned=["week-1"]), "week-2")
    assert after.tasks == ("week-1",)
    back = pt.Learner.open(run, device="cpu").backbone.model.state_dict()
    assert furthest(back, first.backbone.model.state_dict()) == 0
    with pytest.raises(RunError, match="taken out"):
        pt.Keep("olora", run=run, task="week-2")


def test_a_run_of_the_learner_goes_on(base, weeks, tmp_path):
    """And the rule of the trainer's week is that of the run: without it the weights are others."""
    ours = learner(base, tmp_path / "learner", "olora")
    ours.learn(weeks)
    first = pt.load_stream(weeks.source["source"], metric="exact_match", tasks=["week-1"])
    found = {}
    for recipe in ("olora", "lora"):
        learner(base, tmp_path / recipe, recipe).learn(first)
        keep_week(base, tmp_path / recipe, "week-2", tmp_path / "out", None)
        found[recipe] = adapter_of(Result(tmp_path / recipe).commits[2])
    assert furthest(found["olora"], adapter_of(Result(tmp_path / "learner").commits[2])) < 1e-4
    assert furthest(found["lora"], found["olora"]) > 1e-3
    result = learner(base, tmp_path / "olora", "olora").learn(first)  # nothing is left to be learned
    assert result.tasks == ("week-1", "week-2")
    with pytest.raises(RunError, match="another configuration: recipe.tuner.lora_alpha was 32"):
        pt.Keep({"name": "olora", "rank": 4}, run=tmp_path / "olora", task="week-3")


@pytest.mark.parametrize("recipe", ["olora", "sequential_lora"])
def test_a_peft_model_comes_back_as_training_left_it(base, recipe, tmp_path):
    config = peft.LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"])
    for week in WEEKS:
        plain = keep_week(base, tmp_path / "plain", week, tmp_path / "out", recipe)
        keep = pt.Keep(recipe, run=tmp_path / "peft", task=week)
        trainer = trainer_for(base, week, keep, tmp_path / "out", adapter=config)
        before = {k: v.clone() for k, v in trainer.model.state_dict().items() if "base_layer" in k}
        trainer.train()
        commit = Result(tmp_path / "peft").commits[-1]
        assert furthest(adapter_of(commit), adapter_of(Result(tmp_path / "plain").commits[-1])) == 0
        trainer.save_model(tmp_path / week)
        saved = load_file(tmp_path / week / "adapter_model.safetensors")
        assert furthest(saved, adapter_of(commit)) == 0
        now = trainer.model.state_dict()
        assert before and all(torch.equal(now[k], v) for k, v in before.items())
        with torch.no_grad():
            batch = collate(tokens(base, week))
            assert torch.allclose(trainer.model.eval()(**batch).logits, plain.model.eval()(**batch).logits, atol=1e-4)


class Killed(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


def test_a_killed_training_leaves_nothing_and_starts_anew(base, tmp_path):
    run = tmp_path / "run"
    for _ in range(2):
        trainer = trainer_for(base, "week-1", pt.Keep("olora", run=run, task="week-1"), tmp_path / "out")
        trainer.add_callback(Killed)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert Result(run).tasks == ()
    keep_week(base, run, "week-1", tmp_path / "out")
    keep_week(base, tmp_path / "undisturbed", "week-1", tmp_path / "out")
    assert furthest(adapter_of(Result(run).commits[1]), adapter_of(Result(tmp_path / "undisturbed").commits[1])) == 0
    with pytest.raises(RunError, match="learned already"):
        pt.Keep("olora", run=run, task="week-1")


def test_what_keeps_rules_from_acting_is_refused(base, tmp_path, monkeypatch):
    """In one line, before anything is trained."""

    def refused(error, match, recipe="olora", **more):
        with pytest.raises(error, match=match) as found:
            keep_week(base, tmp_path / "run", "week-1", tmp_path / "out", recipe, **more)
        assert "\n" not in str(found.value)
        assert not (tmp_path / "run" / "commits").exists() or len(Result(tmp_path / "run").commits) < 2

    def fresh():
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)

    with pytest.raises(ConfigError, match="no name of a task.*`week_1_a` is"):
        pt.Keep("olora", run=tmp_path / "run", task="Week 1/a")
    with pytest.raises(ConfigError, match="say with which recipe"):
        pt.Keep(run=tmp_path / "run", task="week-1")
    for recipe, why in (
        ("replay", "chooses the rows"),
        ("joint", "chooses the rows"),
        ("frozen_ncm", "trains nothing"),
    ):
        with pytest.raises(ConfigError, match=why):
            pt.Keep(recipe, run=tmp_path / "run", task="week-1")
    refused(ConfigError, "load_best_model_at_end", load_best_model_at_end=True, eval_strategy="steps",
            save_strategy="steps", save_steps=1, eval_steps=1)  # fmt: skip
    refused(ConfigError, "auto_find_batch_size", auto_find_batch_size=True)
    for name, used in (("DeepSpeed", "is_deepspeed_enabled"), ("FSDP", "is_fsdp_enabled")):
        with monkeypatch.context() as patch:
            plain = trainer_for(base, "week-1", None, tmp_path / "out")
            patch.setattr(plain, used, True)
            with pytest.raises(ConfigError, match=name):
                check_trainer(plain)
    model = fresh()
    made = torch.optim.AdamW(model.parameters(), lr=1e-3)
    refused(RuleError, "optimizer that is made already", model=model, optimizers=(made, None))
    lora = {"r": 8, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]}
    refused(ModelError, "r is 4 in it and 8", adapter=peft.LoraConfig(**{**lora, "r": 4}))
    refused(ModelError, "not where recipe", adapter=peft.LoraConfig(**{**lora, "target_modules": ["q_proj"]}))
    refused(ModelError, "init_lora_weights is 'pissa'", adapter=peft.LoraConfig(**lora, init_lora_weights="pissa"))
    refused(ModelError, "trains no adapter", "sotu", adapter=peft.LoraConfig(**lora))
    trained = peft.get_peft_model(fresh(), peft.LoraConfig(**lora))
    next(p for n, p in trained.named_parameters() if "lora_B" in n).data.fill_(1e-3)
    refused(ModelError, "not at its start.*perpetune adopt", model=trained)
    pissa = peft.LoraConfig(**lora, init_lora_weights="pissa")
    merged = pt.Recipe(pissa, consolidation=pt.Merge(), name="own")
    refused(ConfigError, "changes the base", merged)
    projected = pt.Recipe(pissa, [pt.SubspaceProjection(branch="kept")], name="own")
    refused(RuleError, "takes a part of the base away", projected)
    late = trainer_for(base, "week-1", None, tmp_path / "out")
    late.add_callback(pt.Keep("olora", run=tmp_path / "run", task="week-1"))
    with pytest.raises(RuleError, match="too late"):
        late.train()
    with pytest.raises(ConfigError, match="run directory"):
        trainer_for(base, "week-1", pt.Keep("olora", run=tmp_path / "out", task="week-1"), tmp_path / "out")


class Loosen(TrainerCallback):
    """Freezes what the recipe trains before the optimizer is made, or lets weights be no numbers."""

    def __init__(self, way):
        self.way = way

    def on_train_begin(self, args, state, control, *, model, optimizer, **kwargs):
        if self.way == "optimizer":
            optimizer.param_groups[0]["params"].pop()

    def on_step_end(self, args, state, control, *, model, **kwargs):
        if self.way == "nan":
            next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))


def test_scores_are_in_the_precision_of_the_weights(base, tmp_path):
    """A trainer in bf16 puts autocast around the model: in it, merging would seem to change what is computed."""
    trainer = keep_week(base, tmp_path / "run", "week-1", tmp_path / "out", bf16=True)
    result = Result(tmp_path / "run")
    merged = [g for g in result.guarantees if g["name"] == "merged against unmerged outputs"]
    assert merged and all(g["holds"] for g in merged)
    exported = pt.Learner.open(tmp_path / "run", device="cpu").backbone.model
    batch = collate(tokens(base, "week-1")[:1])
    with torch.no_grad():
        score = float(torch.exp(-exported(**batch).loss))
    assert result.scores("likelihood", "domain")[0]["week-1"][0] == pytest.approx(score, rel=1e-5)
    assert "_original_forward" in trainer.model.__dict__  # the trainer's own autocast is there again
    assert trainer.model.__dict__["forward"] is not trainer.model.__dict__["_original_forward"]


@pytest.mark.parametrize(
    ("way", "error", "match"), [("optimizer", RuleError, "does not hold"), ("nan", TrainingError, "not finite")]
)
def test_what_goes_wrong_in_training_is_not_committed(base, way, error, match, tmp_path):
    with pytest.raises(error, match=match):
        keep_week(base, tmp_path / "run", "week-1", tmp_path / "out", first=[Loosen(way)], tests=False)
    assert not (tmp_path / "run").exists() or not Result(tmp_path / "run").tasks
    keep_week(base, tmp_path / "run", "week-1", tmp_path / "out", tests=False)
    manifest = Result(tmp_path / "run").commits[1].manifest
    assert manifest["not_evaluated"] == ["week-1"]
    assert manifest["trainer"]["left_out"] == ["scores: the trainer has no eval_dataset of this task"]
