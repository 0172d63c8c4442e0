"""How far a language model moves on prompts of no task."""

from __future__ import annotations

import json

import pytest
import torch

from perpetune import Learner, load_stream
from perpetune.cli import main
from perpetune.core.errors import ConfigError
from perpetune.learning import general as module
from perpetune.learning.evaluator import read_by_state
from perpetune.learning.general import KL, SAME, General, read_general
from perpetune.models.loading import load_language_model
from perpetune.runs.result import Result

pytestmark = pytest.mark.usefixtures("quick_collection")

TRAINING = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 2}
PROMPTS = ["the film market", "good", "a band and a team and the world", "awful science"]
GENERAL_LOSS = "change of cross-entropy on texts of no task"


@pytest.fixture(scope="module")
def stream(word_stream):
    return load_stream(word_stream, tasks=["films", "news"], pose="instruction", train_limit=4, test_limit=3)


def measured(result, name):
    return {g["task"]: g["value"] for g in result.guarantees if g["name"] == name}


def opened(folder):
    backbone = load_language_model(folder)
    backbone.open(["yes", "no"], ["options"])
    return backbone.eval()


@torch.no_grad()
def by_hand(old, new, prompts):
    """KL over all positions, each prompt alone, and answers token by token, with nothing but the models' logits."""

    def logits(backbone, prompt, answer):
        ids = torch.tensor([prompt])
        if backbone.start is None:
            return backbone.model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0]
        fed = torch.tensor([[backbone.start, *answer]])
        return backbone.model(input_ids=ids, decoder_input_ids=fed).logits[0]

    def answer(backbone, prompt):
        said = []
        while len(said) < module.LONGEST:
            token = int(logits(backbone, prompt, said)[-1].argmax())
            if token in backbone.ends:
                break
            said.append(token)
        return said

    kls, other = [], 0
    for prompt, *_ in old.tokens.prompts(prompts, 100):
        said = answer(old, prompt)
        other += answer(new, prompt) != said
        p, q = (logits(m, prompt, said).log_softmax(-1) for m in (old, new))
        kls += (p.exp() * (p - q)).sum(1).tolist()
    return sum(kls) / len(kls), other / len(prompts)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_it_is_the_kl_of_every_position_and_the_share_of_other_answers(tiny_lm, kind, monkeypatch):
    monkeypatch.setattr(module, "LONGEST", 6)
    old, new = opened(tiny_lm(kind)), opened(tiny_lm(kind))
    found = General.of(old, PROMPTS, 2)
    with torch.no_grad():
        for p in new.model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    kl, other = by_hand(old, new, PROMPTS)
    assert found.total == len(found.chosen) and kl > 1e-3
    a, b = found.measure(new, 3)
    assert (a.name, b.name) == (KL, SAME)
    assert a.value == pytest.approx(kl, rel=1e-3) and b.value == pytest.approx(other)
    a, b = found.measure(old, 2)
    assert a.value == b.value == 0


def test_of_many_positions_some_are_taken_evenly(tiny_lm, monkeypatch):
    monkeypatch.setattr(module, "POSITIONS", 5)
    found = General.of(opened(tiny_lm("llama")), PROMPTS, 2)
    assert len(found.chosen) == len(found.log_p) == 5 < found.total
    assert sorted(found.chosen) == found.chosen and len({i for i, _ in found.chosen}) > 2


def test_it_is_measured_where_all_tasks_are_evaluated_and_resumes_to_the_same_figures(tiny_lm, stream, tmp_path):
    folder, settings = tiny_lm("llama"), {"training": {**TRAINING, "learning_rate": 1e-2}, "general": PROMPTS}
    every = Learner(folder, "lora", tmp_path / "every", **settings).learn(stream)
    assert set(measured(every, KL)) == set(measured(every, SAME)) == {"films", "news"}
    assert measured(every, KL)["news"] > 0
    Learner(folder, "lora", tmp_path / "parts", **settings).learn(stream.select(["films"]))
    parts = Learner(folder, "lora", tmp_path / "parts", **settings).learn(stream)
    assert measured(parts, KL)["news"] == measured(every, KL)["news"]
    last = Learner(folder, "lora", tmp_path / "last", evaluate_every=0, **settings).learn(stream)
    assert set(measured(last, KL)) == set(measured(last, GENERAL_LOSS)) == {"news"}
    assert measured(last, KL) == pytest.approx({"news": measured(every, KL)["news"]})
    plain = Learner(folder, "lora", tmp_path / "plain", training=settings["training"]).learn(stream)
    assert not measured(plain, KL) and set(measured(plain, GENERAL_LOSS)) == {"films", "news"}


def test_a_file_from_the_command_line(tiny_lm, word_stream, tmp_path):
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": p, "id": 1}) for p in PROMPTS), encoding="utf-8")
    arguments = ["run", "--model", tiny_lm("llama"), "--stream", word_stream, "--tasks", "films", "--pose"]
    arguments += ["instruction", "--train-limit", 4, "--test-limit", 3, "--out", tmp_path / "r", "--set", "max_steps=1"]
    arguments += ["--recipe", "lora"]  # one model for all tasks
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in (*arguments, "--general", tmp_path / "p.jsonl")])
    assert ended.value.code == 0 and set(measured(Result(tmp_path / "r"), KL)) == {"films"}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", '{"text": "x"}', "neither a `prompt`"),
        ("b.jsonl", "x", "is no JSON"),
        ("c.txt", "\n", "no prompt"),
        ("d.jsonl", '{"prompt": "a"}\n{"messages": [{"role": "user", "content": "b"}]}', "mixes"),
    ],
)
def test_files_that_hold_no_prompts_are_refused(name, text, said, tmp_path):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=said):
        read_general(tmp_path / name)


def test_where_nothing_can_be_measured(tiny_lm, tiny_bert, stream, word_stream, tmp_path):
    with pytest.raises(ConfigError, match="no language model"):
        texts = load_stream(word_stream, tasks=["films"], train_limit=4, test_limit=2)
        Learner(tiny_bert(), "lora", tmp_path / "b", training=TRAINING, general=PROMPTS).learn(texts)
    result = Learner(tiny_lm("llama"), "color_oracle", tmp_path / "c", training=TRAINING, general=PROMPTS).learn(stream)
    assert not measured(result, KL)


def test_where_every_task_has_an_adapter_each_prompt_is_routed(tiny_lm, stream, tmp_path):
    training = {**TRAINING, "learning_rate": 1e-2}
    learner = Learner(tiny_lm("llama"), "color", tmp_path / "r", training=training, general=PROMPTS)
    result = learner.learn(stream)
    backbone, states, (general,) = learner.backbone, learner.state.consolidation.states, learner.state.general
    routes = states.weights(read_by_state(backbone, states, general.examples, 2)).argmax(1).tolist()
    kl, other = [], 0
    for i, (example, route) in enumerate(zip(general.examples, routes, strict=True)):
        own = [n for n, (j, _) in enumerate(general.chosen) if j == i]
        alone = General([example], [(0, general.chosen[n][1]) for n in own], general.log_p[own], len(own))
        with states.view(route):
            kl += [alone.kl(backbone, 2)] * len(own)
            ((old, new),) = alone.answers(backbone, 2)
        other += old != new
    assert measured(result, KL)["news"] == pytest.approx(sum(kl) / len(kl), rel=1e-4) and min(kl) > 0
    assert measured(result, SAME)["news"] == pytest.approx(other / len(PROMPTS))
