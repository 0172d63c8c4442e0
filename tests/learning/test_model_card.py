"""The card of an export: what stands in its head and on it, and that its lines load the model."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from huggingface_hub import ModelCard

import perpetune as pt
from perpetune.learning import card_usage, model_card
from perpetune.models.public_name import on_hub, public_name, repository, without_places
from perpetune.recipes.papers import PAPERS, bibtex, papers_of_recipe
from tests.calling import call

TRAINING = {"max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def base(tiny_bert, tmp_path_factory):
    """A base model with a card of its own, as those of the Hub have."""
    folder = tmp_path_factory.mktemp("base") / "bäse"
    shutil.copytree(tiny_bert(), folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# ours\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def stream(word_stream):
    return pt.load_stream(word_stream, tasks=["films", "news"], train_limit=16, test_limit=8)


@pytest.fixture(scope="module")
def run(base, stream, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "olora"
    pt.Learner(base, "olora", path, training=TRAINING).learn(stream)
    return path


def card_of(folder):
    return ModelCard.load(str(folder / "README.md"))


def test_a_card_says_what_the_run_measured(run, tmp_path, monkeypatch, capsys):
    code, _, err = call(monkeypatch, capsys, "export", run, "--format", "adapters", "--out", tmp_path / "a")
    assert code == 0, err
    card = card_of(tmp_path / "a")
    assert card.data.library_name == "peft" and card.data.license == "apache-2.0"
    assert {"perpetune", "continual-learning", "olora", "lora"} <= set(card.data.tags)
    assert card.data.base_model is None  # a folder is no repository
    assert "The base model is `bäse`, which was not loaded from the Hub" in card.text
    result = pt.Result(run)
    matrix = result.matrix("linear", "class")
    assert f"| films (n = {matrix.test_sizes[0]}) | news (n = {matrix.test_sizes[1]}) |" in card.text
    cells = " | ".join(f"{100 * x:.1f}" for x in matrix.values[-1])
    assert f"| news | {cells} |" in card.text and f"| films | {100 * matrix.values[0, 0]:.1f} |  |" in card.text
    for commit in result.active:
        for task, fingerprint in commit.manifest["data"].items():
            assert re.search(rf"\| {task} \| .* \| 16 \| 8 \| `{fingerprint[:16]}` \|", card.text)
    for (source, name), found in result.promises().items():
        worst = max(g["value"] for g in found)
        assert f"| kept | {source}: {name} | {worst:.2g} | {found[0]['bound']:.2g} |" in card.text
    assert "eprint = {2310.14152}" in card.text and "BROKEN" not in card.text
    assert "perpetune export olora --format adapters --out a\n" in card.text
    assert card.text.index("## How to load it") < card.text.index("## Data") < card.text.index("## Citation")


def test_no_card_names_a_place_of_this_machine(run, base, tmp_path, monkeypatch, capsys):
    for format in ("merged", "adapters"):
        out = tmp_path / format
        assert call(monkeypatch, capsys, "export", run, f"--format={format}", f"--out={out}", "--model", base)[0] == 0
        assert f"perpetune export olora --format={format} --out={format} --model 'bäse'" in card_of(out).text
        told = {p.name for p in out.rglob("*.*") if str(base.parent).encode() in p.read_bytes()}
        # what peft and vLLM load the base model from
        assert told == ({"adapter_config.json", "routes.json"} if format == "adapters" else set())
        assert str(tmp_path) not in (out / "README.md").read_text(encoding="utf-8")


def test_a_broken_promise_stands_first(run, tmp_path):
    path = shutil.copytree(run, tmp_path / "r")
    newest = sorted((path / "commits").iterdir())[-1] / "commit.json"
    manifest = json.loads(newest.read_text(encoding="utf-8"))
    own = next(g for g in manifest["guarantees"] if g["bound"] is not None)
    own.update(value=12.5, holds=False)
    del manifest["sha256"]  # of what was written
    newest.write_text(json.dumps(manifest), encoding="utf-8")
    text = card_of(pt.Learner.open(path).export(tmp_path / "m")).text
    assert text.index("BROKEN PROMISE") < text.index("Made by perpetune") and "🔴 **broken**" in text
    table = text[text.index("## What was promised") :]
    assert "12" in next(line for line in table.splitlines() if "broken" in line)
    assert table.index("**broken**") < (table.index("| kept") if "| kept" in table else len(table))


def test_the_lines_on_a_card_load_the_model(run, base, tmp_path, monkeypatch, capsys):
    learner = pt.Learner.open(run)
    every = ({}, {"head": False}, {"format": "adapters"}, {"format": "adapters", "head": False})
    for number, settings in enumerate(every):
        folder = learner.export(tmp_path / str(number), **settings)
        code = re.search(r"```python\n(.*?)```", card_of(folder).text, re.DOTALL)[1]
        monkeypatch.chdir(folder)
        (folder / base.name).symlink_to(base)  # where the card of adapters looks for it
        exec(compile(code, "card", "exec"), {})
        printed = capsys.readouterr().out
        assert (settings.get("head") is False) == ("[" not in printed)


def test_a_classifier_and_a_language_model_have_their_uses(base, stream, word_stream, tiny_lm, tmp_path, monkeypatch):
    learner = pt.Learner(base, "lora", tmp_path / "r", training=TRAINING, pooling="cls")
    learner.learn(stream)
    prompts = pt.load_stream(word_stream, tasks=["films"], pose="instruction", train_limit=8, test_limit=4)
    speaker = pt.Learner(tiny_lm("llama"), "sequential_lora", tmp_path / "l", training=TRAINING)
    speaker.learn(prompts)
    for learned, pipeline in ((learner, "text-classification"), (speaker, "text-generation")):
        card = card_of(learned.export(tmp_path / pipeline))
        assert (card.data.pipeline_tag, card.data.library_name) == (pipeline, "transformers")
        code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1]
        assert len(code.strip().splitlines()) == 3
        monkeypatch.chdir(tmp_path / pipeline)
        exec(compile(code, "card", "exec"), {})


def test_what_lies_on_the_hub_is_named_by_its_repository(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert on_hub("Qwen/Qwen2.5-0.5B") and not on_hub("runs//x") and not on_hub(None)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert not on_hub("models/mine") and public_name("models/mine") == "mine" and repository("models/mine") is None
    kept = tmp_path / "hub" / "models--Qwen--Qwen2.5-0.5B" / "snapshots" / "abc"
    kept.mkdir(parents=True)
    for name in (str(kept), str(kept / "model.gguf"), "Qwen/Qwen2.5-0.5B"):
        assert repository(name) == public_name(name) == "Qwen/Qwen2.5-0.5B"
    assert model_card._license("Qwen/Qwen2.5-0.5B") is None  # nothing of it lies here
    (tmp_path / "models" / "mine" / "README.md").write_text("---\nlicense: [oops\n---\n", encoding="utf-8")
    assert model_card._license("models/mine") is None


def test_paths_in_a_command_are_cut_to_their_last_part():
    words = ["--model", "/data/models/ours", "--out=/data/runs/a/", "--set", "a=/b", "runs/a", "--threshold=0.5"]
    told = ["--model", "ours", "--out=a", "--set", "a=/b", "runs/a", "--threshold=0.5"]
    assert [*map(without_places, words)] == told


def test_a_gguf_file_is_loaded_from_its_folder():
    line = card_usage._base("/models/small", "s.Q4_1.gguf", "AutoModelForCausalLM", "AutoTokenizer")
    assert line == [
        'base = "small"  # the folder of the base model',
        'model, reader = AutoModelForCausalLM.from_pretrained(base, gguf_file="s.Q4_1.gguf"), '
        'AutoTokenizer.from_pretrained(base, gguf_file="s.Q4_1.gguf")',
    ]


def test_papers_are_cited_as_bibtex_knows_them():
    assert papers_of_recipe("olora_released") == ["2310.14152"] and papers_of_recipe("mine") == []
    assert "2405.13383" in papers_of_recipe("pegp_lora_fresh")
    for number in PAPERS:
        entry = bibtex(number)
        assert entry.count("{") == entry.count("}") and f"year = {{20{number[:2]}}}" in entry
    assert "(N-LoRA)" not in bibtex("2410.10179") and "LLMs?}" in bibtex("2410.10179")
