"""The recipe of a run that names none."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

import perpetune as pt
from perpetune.cli.app import app
from perpetune.learning.config import RunConfig, load_config
from perpetune.learning.usual import names_no_recipe, usual_recipe
from perpetune.recipes import RECIPES, routing
from perpetune.recipes.recipe import Recipe
from perpetune.runs.config_file import read_config


@pytest.fixture
def stream(word_stream):
    return pt.load_stream(word_stream, tasks=["films", "news"])


@pytest.mark.parametrize(
    ("how", "drift", "expected"),
    [({}, False, "default"), ({}, True, "lora"), ({"inputs": "prompts"}, False, "routed")],
    ids=["texts", "drift", "prompts"],
)
def test_it_follows_from_what_is_learned(stream, how, drift, expected):
    name, why = usual_recipe(stream if not how else Of(**how), drift)
    assert name == expected and why


class Of:
    def __init__(self, inputs):
        self.modality, self.captions = {"prompts": "language", "captions": "image"}[inputs], inputs == "captions"


def test_captions_are_learned_by_one_model():
    assert usual_recipe(Of("captions"))[0] == "lora"


def test_a_run_takes_it_and_goes_on_with_its_own(word_stream, tiny_bert, tmp_path, monkeypatch):
    def smaller(features: int = 64, holdout: float = 0.1) -> Recipe:
        return routing.default(features=features, holdout=holdout)

    monkeypatch.setitem(RECIPES, "default", smaller)
    options = ["--stream", str(word_stream), "--tasks", "films,news", "--set", "max_steps=2", "--max-length", "16"]
    fresh = CliRunner().invoke(app, ["run", "--model", tiny_bert(), *options, "--out", str(tmp_path / "new")])
    assert fresh.exit_code == 0, fresh.output
    assert "recipe: default, since" in fresh.output and read_config(tmp_path / "new")["recipe"]["name"] == "default"
    lora = pt.Learner(tiny_bert(), "lora", tmp_path / "old", training={"max_steps": 2}, max_length=16)
    lora.learn(pt.load_stream(word_stream, tasks=["films"]))
    again = CliRunner().invoke(app, ["run", *options, "--out", str(tmp_path / "old")])
    assert again.exit_code == 0 and "recipe: " not in again.output, again.output
    assert read_config(tmp_path / "old")["recipe"]["name"] == "lora"
    assert pt.Learner.open(tmp_path / "old").state.known.tasks == ["films", "news"]


@pytest.mark.parametrize(("written", "expected"), [("", True), ("recipe: lora\n", False)])
def test_a_recipe_that_is_named_is_taken(written, expected, tmp_path):
    (tmp_path / "c.yaml").write_text(f"stream: {{source: x}}\n{written}", encoding="utf-8")
    assert names_no_recipe(load_config(str(tmp_path / "c.yaml"), RunConfig, {})) is expected
