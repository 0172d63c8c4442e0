"""The examples run, and a stock trainer with rules attached does what a plain loop does."""

from __future__ import annotations

import copy
import json
import re

import peft
import pytest
import torch
from transformers import Trainer, TrainingArguments

import perpetune as pt
from examples import pretrain_instructions
from examples.attach_plain_loop import TASKS, batch, run, tiny_llama
from examples.attach_trl import Attach
from perpetune.models.loading import load_language_model

STEPS, RATE = 6, 5e-3
ARGUMENTS = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "learning_rate": RATE,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "save_strategy": "no",
}


def adapted(model):
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"]))


def plain_loop(model, tasks):
    """The tasks one after another, every step on all of a task's examples; the merged model."""
    rule = pt.SubspaceProjection(energy=1.0, branch="fresh")
    for index, data in enumerate(tasks):
        tuned = adapted(model)
        optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
        inputs = {name: data[name] for name in ("input_ids", "attention_mask")}
        attached = pt.attach(tuned, optimizer, [rule], index=index, batches=lambda inputs=inputs: [inputs])
        for _ in range(STEPS):
            optimizer.zero_grad()
            tuned(**data).loss.backward()
            optimizer.step()
        attached.remove()
        rule.end_task(pt.TaskContext(tuned, index, lambda inputs=inputs: [inputs]))
        model = tuned.merge_and_unload()
    return model.state_dict()


def same_weights(ours, theirs, base):
    moved = [name for name in base if not torch.equal(base[name], ours[name])]
    assert moved
    return all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in base)


def test_the_plain_loop_keeps_old_answers_and_learns_new_ones():
    losses = run(*tiny_llama())
    assert losses["capitals"][1] == pytest.approx(losses["capitals"][0], rel=1e-5)
    assert losses["colours"][1] < losses["colours"][0] / 2
    assert losses["capitals"][0] < 0.1


def test_a_stock_trainer_with_rules_attached_does_what_the_plain_loop_does(tmp_path):
    model, encode = tiny_llama()
    model.double()  # Adam divides by gradients that are next to nothing: in fp32 the rounding of two loops shows
    base = {name: t.clone() for name, t in model.state_dict().items()}
    tasks = [batch(pairs, encode) for pairs in TASKS.values()]
    expected = plain_loop(copy.deepcopy(model), tasks)
    rules = [pt.SubspaceProjection(energy=1.0, branch="fresh")]
    for index, data in enumerate(tasks):
        tuned = adapted(model)
        rows = [{name: values[i] for name, values in data.items()} for i in range(2)]
        arguments = TrainingArguments(output_dir=str(tmp_path), **ARGUMENTS)
        trainer = Trainer(model=tuned, args=arguments, train_dataset=rows, callbacks=[Attach(rules, index)])
        trainer.train()
        model = tuned.merge_and_unload()
    assert same_weights(expected, model.state_dict(), base)


def test_trls_trainer_with_rules_attached_does_what_the_plain_loop_does(tiny_lm, tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is not installed: pip install trl")
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_lm("llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    base, first = {name: t.clone() for name, t in model.state_dict().items()}, copy.deepcopy(model)
    rules = [pt.SubspaceProjection(energy=1.0, branch="fresh")]
    tasks = []
    for index, pairs in enumerate(TASKS.values()):
        tuned = adapted(model)
        settings = {**ARGUMENTS, "bf16": False, "gradient_checkpointing": False, "completion_only_loss": True}
        trainer = trl.SFTTrainer(
            model=tuned,
            args=trl.SFTConfig(output_dir=str(tmp_path), **settings),
            train_dataset=datasets.Dataset.from_list([{"prompt": p, "completion": c} for p, c in pairs]),
            processing_class=tokenizer,
            callbacks=[Attach(rules, index)],
        )
        data = next(iter(trainer.get_train_dataloader()))
        tasks.append({name: data[name] for name in ("input_ids", "attention_mask", "labels")})
        trainer.train()
        model = tuned.merge_and_unload()
    assert same_weights(plain_loop(first, tasks), model.state_dict(), base)


def test_an_encoder_learns_to_answer(tiny_bert, word_stream, tmp_path, monkeypatch):
    """The losses fall, what is written is a language model, the same bits again, and what is there is kept."""
    texts = " ".join(
        prompt for task in pt.load_stream(word_stream, pose="instruction") for prompt in task.train["prompt"]
    )
    encoder = tiny_bert(words=re.findall(r"\w+", texts), layers=4)

    def teach(out, *more):
        words = ["x", "--encoder", str(encoder), "--stream", str(word_stream), "--out", str(tmp_path / out)]
        monkeypatch.setattr("sys.argv", [*words, "--tasks", "films", "mood", *more])
        pretrain_instructions.main()
        return (tmp_path / out / "model.safetensors").read_bytes()

    monkeypatch.setattr(pretrain_instructions, "FRESH", 2e-3)  # a tiny random encoder learns ten times as fast
    monkeypatch.setattr(pretrain_instructions, "COPIED", 1e-3)
    first = teach("a", "--rows", "1680")
    losses = json.loads((tmp_path / "a" / "pretraining.json").read_text())["losses"]
    assert losses[-1] < 0.5 * losses[0]
    few = ("--rows", "264")  # the schedule begins with a twentieth of the steps: more than one
    assert teach("b", *few) == teach("c", *few) != teach("d", *few, "--puzzles", "0.5")
    model = load_language_model(tmp_path / "a")
    stream = pt.load_stream(word_stream, tasks=["films"], pose="instruction")
    model.open(stream.labels, ["options"])
    scores = model.outputs(model.prepare(stream.tasks[0].test), 8)
    assert (scores.argmax(1) == torch.tensor(stream.tasks[0].test["label"][:])).float().mean() > 0.7
    assert teach("a", "--seed", "1") == first
