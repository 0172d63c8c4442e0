"""Answers of a run's language model: batched, routed, drawn, streamed, and from files."""

from __future__ import annotations

import json
import shutil

import pandas as pd
import pytest
import torch

import perpetune as pt
from perpetune.cli import main
from perpetune.core.errors import ConfigError, ModelError

pytestmark = pytest.mark.usefixtures("quick_collection")

FAQ = {"where is my parcel": "it is on the way", "can i pay later": "yes within thirty days"}
DATES = {"monday the first": "01 06 2026", "friday the fifth": "05 06 2026"}
TRAINING = {"num_train_epochs": 6, "per_device_train_batch_size": 8, "learning_rate": 1e-2}
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("free")
    for task, pairs in {"dates": DATES, "faq": FAQ}.items():
        (root / task).mkdir()
        for split, times in (("train", 6), ("test", 2)):
            rows = [{"prompt": f"{p} {i % 2}", "response": r} for i in range(times) for p, r in pairs.items()]
            (root / task / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def model(tiny_lm):
    words = " ".join([*FAQ, *FAQ.values(), *DATES, *DATES.values()]).split()
    return tiny_lm("llama", words)


@pytest.fixture(scope="module")
def learned(folder, model, tmp_path_factory):
    """A run with one model, and one with an adapter for every task."""
    runs = tmp_path_factory.mktemp("runs")
    stream = pt.load_stream(folder, metric="exact_match")
    for recipe in ("lora", "color"):
        pt.Learner(model, recipe, runs / recipe, training=TRAINING).learn(stream)
    return {recipe: pt.Learner.open(runs / recipe) for recipe in ("lora", "color")}


def greedy(learner, prompt, longest):
    """Token by token, with nothing but the model's logits."""
    backbone = learner.backbone
    read = backbone.tokens.conversations if isinstance(prompt, list) else backbone.tokens.prompts
    ids, said = torch.tensor([read([prompt], 100)[0][0]]), []
    while len(said) < longest:
        with torch.no_grad():
            token = int(backbone.model(input_ids=ids).logits[0, -1].argmax())
        if token in backbone.ends:
            break
        said.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
    return backbone.processor.decode(said, skip_special_tokens=True)


def test_answers_are_greedy_and_end_where_the_model_ends(learned):
    learner = learned["lora"]
    prompts = ["where is my parcel 0", "monday the first 1 and some more words", "can i pay later 1"]
    found = learner.generate(prompts, max_new_tokens=12)
    assert found == [greedy(learner, p, 12) for p in prompts] and any(found)
    assert found == learner.generate(prompts, max_new_tokens=12, batch_size=1)
    assert learner.generate(prompts[:1], max_new_tokens=2) == [greedy(learner, prompts[0], 2)]
    assert learner.generate([]) == []


def test_predict_returns_what_is_generated_for_free_texts(learned):
    prompts = [f"{p} 0" for p in FAQ]
    found = learned["lora"].predict(prompts)
    assert all(found) and found == learned["lora"].generate(prompts, max_new_tokens=50)


def test_predict_returns_an_answer_that_names_no_class(folder, model, tmp_path):
    """Responses as classes, generated: not an empty text, of which nobody knows what it means."""
    learner = pt.Learner(model, "lora", tmp_path / "r", heads=["language_generated"], training={"max_steps": 1})
    learner.learn(pt.load_stream(folder))
    prompts = [f"{p} 0" for p in FAQ]
    found = learner.predict(prompts)
    assert found == learner.generate(prompts, max_new_tokens=50) and all(found)
    assert learner.predict(prompts, classes=list(FAQ.values())) == ["", ""]


def test_each_prompt_goes_to_its_task(learned):
    learner = learned["color"]
    prompts = [f"{p} 0" for p in (*DATES, *FAQ)]
    by_task = {task: learner.generate(prompts, task=task, max_new_tokens=10) for task in ("dates", "faq")}
    assert by_task["dates"] != by_task["faq"]
    routed = learner.generate(prompts, max_new_tokens=10)
    assert all(text in pair for text, pair in zip(routed, zip(*by_task.values(), strict=True), strict=True))
    with pytest.raises(ConfigError, match="no task `date`"):
        learner.generate(prompts, task="date")
    with pytest.raises(ConfigError, match="the same for all tasks"):
        learned["lora"].generate(prompts, task="dates")


def test_draws_come_from_the_seed_alone(learned):
    learner, prompts = learned["lora"], ["where is my parcel 0", "monday the first 1"]
    drawn = [learner.generate(prompts, temperature=3.0, seed=seed, max_new_tokens=8) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    torch.manual_seed(7)
    before = torch.rand(1)
    torch.manual_seed(7)
    learner.generate(prompts, temperature=1.0, max_new_tokens=2)
    assert torch.equal(torch.rand(1), before)  # the caller's own draws go on
    nearly = learner.generate(prompts, temperature=1.0, top_p=1e-6, max_new_tokens=8)
    assert nearly == learner.generate(prompts, max_new_tokens=8)


def test_a_text_is_a_turn_where_conversations_were_learned(tiny_lm, tmp_path):
    from transformers import AutoTokenizer

    folder = shutil.copytree(tiny_lm("llama", ["user", "assistant", *" ".join(FAQ).split()]), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    (tmp_path / "s" / "faq").mkdir(parents=True)
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in FAQ.items()]
    for split in ("train", "test"):
        (tmp_path / "s" / "faq" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    learner = pt.Learner(folder, "lora", tmp_path / "r", training={**TRAINING, "max_steps": 2})
    learner.learn(pt.load_stream(tmp_path / "s", metric="exact_match"))
    question = next(iter(FAQ))
    asked = [question, [{"role": "user", "content": question}], rows[0]["messages"]]
    found = [learner.generate([each], max_new_tokens=6)[0] for each in asked]
    assert found[0] == found[1] == found[2] == greedy(learner, asked[1], 6)
    with pytest.raises(ConfigError, match="once for each kind"):
        learner.generate(asked[:2])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_new_tokens": 0}, "at least one token"),
        ({"temperature": -1}, "or above"),
        ({"top_p": 0}, "share"),
        ({"top_k": 5}, "no setting `top_k`"),
        ({"batch_size": 0}, "at least one prompt"),
    ],
)
def test_settings_are_checked(learned, settings, said):
    with pytest.raises(ConfigError, match=said):
        learned["lora"].generate(["a"], **settings)


def test_what_cannot_be_answered_is_refused(learned, tiny_bert, word_stream, tmp_path):
    with pytest.raises(ModelError, match="reads 256 tokens"):
        learned["lora"].generate(["a"], max_new_tokens=256)
    with pytest.raises(ConfigError, match="list of prompts"):
        learned["lora"].generate("a")
    with pytest.raises(ConfigError, match="one prompt alone"):
        learned["lora"].generate(["a", "b"], streamer=object())
    encoder = pt.Learner(tiny_bert(), "frozen_ridge", tmp_path / "r", training={"max_steps": 1})
    encoder.learn(pt.load_stream(word_stream, tasks=["films"], train_limit=4, test_limit=2))
    with pytest.raises(ConfigError, match="use predict"):
        encoder.generate(["a film"])


def test_a_long_prompt_leaves_room_for_its_answer(learned):
    (answer,) = learned["lora"].generate(["parcel " * 400], max_new_tokens=30)
    assert isinstance(answer, str) and learned["lora"].backbone.room == learned["lora"].backbone.max_length


def command(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(["generate", *map(str, arguments)])
    return ended.value.code, capsys.readouterr()


def test_on_the_command_line(learned, tmp_path, capsys):
    learner, prompt = learned["lora"], "where is my parcel 0"
    (answer,) = learner.generate([prompt], max_new_tokens=9)
    code, said = command(capsys, learner.path, prompt, "--max-new-tokens", 9)
    assert code == 0 and said.out.strip() == answer.strip()
    (tmp_path / "q.txt").write_text(f"{prompt}\n\nmonday the first 1\n", encoding="utf-8")
    code, said = command(capsys, learner.path, "--input", tmp_path / "q.txt", "--max-new-tokens", 9)
    rows = [json.loads(line) for line in said.out.splitlines()]
    assert rows[0] == {"prompt": prompt, "generated": answer} and len(rows) == 2
    asked = [{"id": 7, "prompt": prompt, "response": "x"}, {"id": 8, "prompt": "monday the first 1"}]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, asked)), encoding="utf-8")
    out = tmp_path / "a.jsonl"
    assert (
        command(capsys, learner.path, "--input", tmp_path / "q.jsonl", "--output", out, "--max-new-tokens", 9)[0] == 0
    )
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").split("\n") if line]
    assert rows[0] == {**asked[0], "generated": answer} and rows[1]["id"] == 8
    (tmp_path / "q.csv").write_text(f"id,prompt\n7,{prompt}\n", encoding="utf-8")
    table = tmp_path / "a.csv"
    command(capsys, learner.path, "--input", tmp_path / "q.csv", "--output", table, "--max-new-tokens", 9)
    assert pd.read_csv(table).to_dict("list") == {"id": [7], "prompt": [prompt], "generated": [answer]}
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}', encoding="utf-8")
    code, said = command(capsys, learner.path, "--input", tmp_path / "bad.jsonl")
    assert code == 2 and "line 2" in said.err
    assert command(capsys, learner.path)[0] == 2
