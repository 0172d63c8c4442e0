"""SDFT: the model learns its own answers as it would give them with the response before its eyes, under the rules."""

from __future__ import annotations

import json

import pytest
import torch

import perpetune as pt
from perpetune.core.errors import ConfigError
from perpetune.learning import trainer as training
from perpetune.learning.self_distillation import demonstrated
from perpetune.models.loading import load_language_model
from perpetune.runs.directory import Run
from tests.weeks import CHAT, WEEKS, write

pytest.importorskip("trl")
pytestmark = pytest.mark.usefixtures("quick_collection")

SETTINGS = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "sdft": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("weeks"), WEEKS, train=3)


@pytest.fixture(scope="module")
def stream(folder):
    return pt.load_stream(folder, metric="exact_match", tasks=["faq", "dates"])


@pytest.fixture(scope="module")
def model(tiny_lm):
    words = " ".join(f"{p} {r}" for pairs in WEEKS.values() for p, r in pairs.items()).split()
    return tiny_lm("llama", words)


def test_it_learns_under_a_rule_and_commits_and_the_same_bits_again(model, stream, tmp_path):
    runs = [tmp_path / "a", tmp_path / "b"]
    for run in runs:
        result = pt.Learner(model, "pegp_lora_fresh", run, training=SETTINGS).learn(stream)
    assert result.tasks == ("faq", "dates")
    steps = [e["steps"] for e in result.journal if e["event"] == "task"]
    assert steps == [3, 3] and all(e["last_loss"] > 0 for e in result.journal if e["event"] == "task")
    kept = [g["holds"] for g in result.guarantees if g["source"] == "SubspaceProjection" and g["task"] == "dates"]
    assert kept and all(held is not False for held in kept) and True in kept
    first, again = (Run.read(run).commits[2].tensors("adapter_model.safetensors") for run in runs)
    assert first.keys() == again.keys() and all(torch.equal(first[k], again[k]) for k in first)
    settings = {k: v for k, v in SETTINGS.items() if k != "sdft"}
    plain = pt.Learner(model, "pegp_lora_fresh", tmp_path / "sft", training=settings)
    other = plain.learn(stream).commits[2].tensors("adapter_model.safetensors")
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_the_loss_is_between_the_model_and_itself_with_the_response_shown(model, stream, tmp_path, monkeypatch):
    seen = []
    made = training.sdft_trainer

    def watched(*arguments):
        trainer = made(*arguments)
        compute = trainer._compute_self_distillation_loss

        def computed(model, inputs, logits):
            loss = compute(model, inputs, logits)
            seen.append((trainer, {k: v.clone() for k, v in inputs.items()}, logits, loss.detach()))
            return loss

        trainer._compute_self_distillation_loss = computed
        return trainer

    monkeypatch.setattr(training, "sdft_trainer", watched)
    learner = pt.Learner(model, "lora", tmp_path / "run", training={**SETTINGS, "max_steps": 1})
    learner.learn(stream.select(["faq"]))
    trainer, inputs, logits, loss = seen[0]
    backbone = load_language_model(model)
    backbone.open(stream.labels, ["options"])
    shown = demonstrated(backbone, stream.tasks[0].train, 5)
    texts = [backbone.processor.decode(ids) for ids in shown]
    assert all("on the way" in t or "within thirty days" in t for t in texts)
    completion = inputs["completion_ids"].shape[1]
    assert completion <= 5
    teacher = [
        [t for t, m in zip(*row, strict=True) if m]
        for row in zip(
            inputs["teacher_input_ids"][:, :-completion].tolist(),
            inputs["teacher_attention_mask"][:, :-completion].tolist(),
            strict=True,
        )
    ]
    assert all(row in shown for row in teacher)
    # at the first step the adapter changes nothing: the teacher is the base model on the shown prompt
    with torch.no_grad():
        told = backbone.model(
            input_ids=inputs["teacher_input_ids"], attention_mask=inputs["teacher_attention_mask"]
        ).logits[:, -completion - 1 : -1]
    assert torch.allclose(told, logits.teacher_logits, atol=1e-5)
    assert not logits.teacher_logits.requires_grad and logits.student_logits.requires_grad
    assert loss > 0


def test_of_conversations_the_last_turn_shows_the_response(model, folder, tmp_path):
    rows = [
        json.dumps(
            {
                "messages": [
                    {"role": "system", "content": "be brief"},
                    {"role": "user", "content": p},
                    {"role": "assistant", "content": r},
                ]
            }
        )
        for p, r in WEEKS["faq"].items()
    ]
    (tmp_path / "s" / "faq").mkdir(parents=True)
    for split in ("train", "test"):
        (tmp_path / "s" / "faq" / f"{split}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    talks = pt.load_stream(tmp_path / "s", metric="exact_match")
    backbone = load_language_model(model)
    backbone.processor.chat_template = CHAT
    backbone.open(talks.labels, ["options"])
    (first, _) = (backbone.processor.decode(t) for t in demonstrated(backbone, talks.tasks[0].train, 5))
    assert first.index("be brief") < first.index("where is my parcel") < first.index("it is on the way")
    assert first.rstrip().endswith("<|assistant|>")


@pytest.mark.parametrize(
    ("more", "said"),
    [({"packing": True}, "`packing` has no effect beside sdft"), ({"stm": 2.5}, "`stm`"), ({"save_steps": 2}, "save_")],
)
def test_what_acts_on_responses_is_refused(model, stream, more, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        pt.Learner(model, "lora", tmp_path / "run", training={**SETTINGS, **more}).learn(stream)
    assert not (tmp_path / "run" / "commits").exists()


def test_another_trainer_has_none_of_it(model, stream, tmp_path):
    with pytest.raises(ConfigError, match="TRL does not train this run"):
        pt.Learner(model, "lora", tmp_path / "run", training=SETTINGS, trainer="perpetune").learn(stream)
    with pytest.raises(ConfigError, match="`sdft` must be a whole number above 0"):
        pt.Learner(model, "lora", tmp_path / "run", training={**SETTINGS, "sdft": True})
