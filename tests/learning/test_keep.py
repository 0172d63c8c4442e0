"""A recipe in somebody else's trainer: what it leaves is what `Learner` would have left, or nothing at all."""

from __future__ import annotations

import json

import datasets
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

import perpetune as pt
from perpetune.core.errors import ConfigError, ModelError, RuleError, RunError, TrainingError
from perpetune.learning.session import task_seed
from perpetune.runs.result import Result

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
    return tiny_lm("llama")


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
    rows = datasets.Dataset.from_dict(
        {"prompt": [p for p, _ in WEEKS[week]], "response": [r for _, r in WEEKS[week]], "label": [-1] * 3, "id": ["x"] * 3}
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


def trainer_for(base, week, callback, out, *, adapter=None, tests=True, kind=Trainer, model=None, **more):
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
    callbacks = [callback] if callback is not None else []
    return kind(
        model=model, args=arguments, train_dataset=rows, eval_dataset=rows if tests else None,
        processing_class=tokenizer, callbacks=callbacks, optimizers=optimizers, **extra,
    )  # fmt: skip


def adapter_of(commit):
    return commit.tensors("adapter_model.safetensors")


def furthest(ours, theirs):
    """The largest difference, as a share of the largest value."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[k] - theirs[k]).abs().max() / theirs[k].abs().max()) for k in ours)


@pytest.mark.parametrize(
    "recipe",
    ["lora", "olora", {"name": "olora_released", "dropout": 0.0}, "sequential_lora", "pegp_lora_fresh"],
    ids=lambda r: r if isinstance(r, str) else r["name"],
)
@pytest.mark.parametrize("kind", ["Trainer", "SFTTrainer"])
def test_two_processes_end_with_the_weights_of_the_learner(base, weeks, recipe, kind, tmp_path, quick_collection):
    if kind == "SFTTrainer":
        kind = pytest.importorskip("trl", reason="TRL is not installed: pip install trl").SFTTrainer
    else:
        kind = Trainer
    ours = learner(base, tmp_path / "learner", recipe)
    ours.learn(weeks)
    for week in WEEKS:
        keep = pt.Keep(recipe, run=tmp_path / "kept", task=week)
        trainer_for(base, week, keep, tmp_path / "out", kind=kind).train()
    expected, found = Result(tmp_path / "learner"), Result(tmp_path / "kept")
    assert found.tasks == expected.tasks == tuple(WEEKS)
    for a, b in zip(found.commits[1:], expected.commits[1:], strict=True):
        print(recipe, kind.__name__, furthest(adapter_of(a), adapter_of(b)))
        assert furthest(adapter_of(a), adapter_of(b)) < 1e-3
        assert a.has("rules.safetensors") == b.has("rules.safetensors")
    opened = pt.Learner.open(tmp_path / "kept", device="cpu")
    theirs = pt.Learner.open(tmp_path / "learner", device="cpu")
    a, b = opened.backbone.model.state_dict(), theirs.backbone.model.state_dict()
    moved = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    assert furthest(a, b) < 1e-3
    prompts = [p for p, _ in WEEKS["week-1"]]
    assert opened.predict(prompts) == theirs.predict(prompts)
