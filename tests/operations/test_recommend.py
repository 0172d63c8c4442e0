from __future__ import annotations

import shlex
from dataclasses import replace

import pytest
from typer.testing import CliRunner

import perpetune as pt
from perpetune.cli.app import app
from perpetune.core.errors import ConfigError
from perpetune.learning.config import CompareConfig
from perpetune.metrics.records import ResultRecord
from perpetune.operations import recommend as module
from perpetune.operations.recommend import best, candidates, recommend
from perpetune.recipes import RECIPES


def record(recipe, accuracy, head="linear", scenario="class", seed=0):
    return ResultRecord.model_construct(
        recipe=recipe, scenario=scenario, head=head, model="m", stream="s", seed=seed, tasks=["a", "b"],
        **{name: accuracy for name in (*module_fields(),)},
    )  # fmt: skip


def module_fields():
    from perpetune.metrics.records import COSTS, FORMULAS

    return (*FORMULAS, *COSTS)


def test_the_best_is_recommended_and_of_level_ones_the_cheaper():
    assert best([record("frozen_best", 0.60), record("routed", 0.64), record("x", 0.70)])[0] == "x"
    assert best([record("frozen_best", 0.697), record("routed", 0.60), record("x", 0.70)])[0] == "frozen_best"
    assert "level with x" in best([record("frozen_best", 0.697), record("x", 0.70)])[1]


def test_of_a_recipe_with_several_heads_and_seeds_the_best_head_counts_on_average():
    found = [record("lora", 0.2), record("lora", 0.8, head="ridge"), record("lora", 0.4, head="ridge", seed=1)]
    assert best([*found, record("routed", 0.5), record("lora", 0.99, scenario="task")])[0] == "lora"


def stream_of(name):
    return pt.load_stream(name, train_limit=8, test_limit=4)


def test_candidates_are_recipes_the_cheapest_first():
    texts = stream_of("digits")
    for stream in (texts, replace(texts, scenario="domain"), replace(texts, inputs=("prompt",))):
        found = candidates(stream)
        assert set(found) <= set(RECIPES) and len(found) > 1
    assert "lora" in candidates(replace(texts, scenario="domain"))  # one model for classes that are shared
    assert not any(name.startswith("frozen") for name in candidates(replace(texts, inputs=("prompt",))))


@pytest.fixture
def config(word_stream, tiny_bert):
    def make(**settings):
        stream = {"source": str(word_stream), **settings.pop("stream", {})}
        training = {"max_steps": 2, "per_device_train_batch_size": 4}
        return CompareConfig.model_validate(
            {"model": str(tiny_bert()), "stream": stream, "training": training, "max_length": 16, **settings}
        )

    return make


def test_recipes_are_tried_on_validation_rows_of_the_first_tasks_and_gone_on_with(config, tmp_path):
    settings = config(recipes=["frozen_ncm", "lora"])
    found = recommend(settings, tmp_path, first=2)
    assert found.recipe in ("frozen_ncm", "lora") and not found.failed and not found.left_out
    whole = settings.stream.load()
    assert {tuple(r.tasks) for r in found.records} == {tuple(task.name for task in whole.tasks[:2])}
    config_file = (tmp_path / "lora/seed-0/own/run.yaml").read_text(encoding="utf-8")
    assert "validation_share: 0.2" in config_file  # and not of the test data
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("commit.json")}
    again = recommend(settings, tmp_path, first=2)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("commit.json")} == before
    assert [r.final_accuracy for r in again.records] == [r.final_accuracy for r in found.records]


def test_what_does_not_fit_into_the_budget_is_left_out(config, tmp_path, monkeypatch):
    seconds = {"frozen_ncm": 30.0, "lora": 100.0, "sequential": 25.0}

    class Plan:
        def __init__(self, learner, stream):
            self.seconds = seconds[learner.recipe.name]

    tried = []
    monkeypatch.setattr(module, "make_plan", Plan)
    monkeypatch.setattr(module, "compare", lambda config, *rest: (tried.extend(config.recipes), ([], []))[1])
    with pytest.raises(ConfigError, match="no recipe could be tried"):
        recommend(config(recipes=["frozen_ncm", "lora", "sequential"]), tmp_path, budget=1.0)
    assert tried == ["frozen_ncm", "sequential"]
    with pytest.raises(ConfigError, match=r"nothing fits into 0.1 minutes \(lora: takes about 1.7 min"):
        recommend(config(recipes=["lora"]), tmp_path, budget=0.1)


@pytest.mark.parametrize(
    ("settings", "options", "told"),
    [
        ({"stream": {"drift": {}}}, {}, "leave out --drift"),
        ({}, {"first": 1}, "from two tasks on"),
        ({}, {"budget": 0.0}, "more than 0"),
        ({"stream": {"tasks": ["films"]}}, {}, "one task"),
        ({"recipes": ["ease"], "model": None}, {}, "no recipe could be tried: ease seed 0"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(settings, options, told, config, tmp_path):
    with pytest.raises(ConfigError, match=told):
        recommend(config(**settings), tmp_path, **options)


def test_the_command_prints_a_table_and_the_command_to_run(word_stream, tiny_bert, tmp_path):
    model = str(tiny_bert())
    options = ["--model", model, "--stream", str(word_stream), "--max-length", "16", "--first", "2"]
    tried = ["--recipes", "frozen_ncm,frozen_lda,color_oracles", "--out", str(tmp_path / "out")]
    refused = CliRunner().invoke(app, ["recommend", *options, *tried])
    assert isinstance(refused.exception, ConfigError) and "color_oracle" in str(refused.exception)
    tried[1] = "frozen_ncm,frozen_lda"
    result = CliRunner().invoke(app, ["recommend", *options, *tried])
    assert result.exit_code == 0, result.output
    last = shlex.split(result.output.splitlines()[-1])
    assert last[:2] == ["perpetune", "run"] and last[last.index("--recipe") + 1] in ("frozen_ncm", "frozen_lda")
    assert last[last.index("--model") + 1] == model and "--first" not in last and "--out" not in last
    assert (tmp_path / "out" / "results.json").is_file() and "on validation rows" in result.output
