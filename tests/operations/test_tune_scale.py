from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

import perpetune as pt
from perpetune.consolidation import SparseSum
from perpetune.operations.tune_scale import accuracy_by_scale

TRAINING = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "learning_rate": 3e-3}
TASKS = ["films", "news", "mood"]


@pytest.fixture(scope="module")
def model(tiny_bert):
    return tiny_bert()


@pytest.fixture(scope="module")
def stream(word_stream):
    return pt.load_stream(word_stream, tasks=TASKS, validation_share=0.25).on_validation()


def learned(model, stream, path, recipe):
    pt.Learner(model, recipe, path, training=TRAINING, heads=["ncm_refresh"]).learn(stream)
    return path


@pytest.fixture(scope="module")
def run(model, stream, tmp_path_factory):
    return learned(model, stream, tmp_path_factory.mktemp("scale") / "r", "task_arithmetic")


def test_the_accuracy_of_a_scale_is_that_of_a_run_with_it(run, model, stream, tmp_path):
    found = accuracy_by_scale(run, stream, [0.0, 0.3, 3.0])
    for scale, accuracy in found.items():
        if scale:
            recipe = {"name": "task_arithmetic", "scale": scale}
            path = learned(model, stream, tmp_path / str(scale), recipe)
            matrix = pt.Result(path).matrix("ncm_refresh", "class").values
            assert accuracy == pytest.approx(matrix[-1].mean())
    base = pt.Learner(model, "frozen_ncm", tmp_path / "base", training=TRAINING).learn(stream)
    assert found[0.0] == pytest.approx(base.matrix("ncm", "class").values[-1].mean())
    assert len(set(found.values())) > 1


def test_the_run_itself_stays_as_it_is(run, stream):
    before = pt.Learner.open(run).backbone.model.state_dict()
    accuracy_by_scale(run, stream, [2.0])
    after = pt.Learner.open(run).backbone.model.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_the_command_prints_every_scale_and_the_best(run):
    from perpetune.cli.app import app

    result = CliRunner().invoke(app, ["tune-scale", str(run), "--values", "0.1,1", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout[result.stdout.index("{") :])
    assert set(found["accuracy"]) == {"0.1", "1"} and found["accuracy"][f"{found['best']:g}"] == max(
        found["accuracy"].values()
    )


def test_a_scale_is_not_chosen_on_test_data(model, word_stream, tmp_path):
    stream = pt.load_stream(word_stream, tasks=TASKS[:2])
    path = learned(model, stream, tmp_path / "r", "soup")
    with pytest.raises(pt.ConfigError, match="--validation"):
        accuracy_by_scale(path, stream)


@pytest.mark.parametrize("recipe", ["lora", SparseSum(0.5, sequential=True)], ids=["merge", "sequential"])
def test_only_independent_deltas_have_a_scale_to_choose(recipe, model, stream, tmp_path):
    if not isinstance(recipe, str):
        recipe = pt.Recipe(pt.AllWeights(), consolidation=recipe)
    stream = stream.select(TASKS[:2])
    path = learned(model, stream, tmp_path / "r", recipe)
    with pytest.raises(pt.ConfigError, match="independent"):
        accuracy_by_scale(path, stream)


@pytest.mark.parametrize(("values", "head"), [([], "ncm"), ([float("nan")], "ncm"), ([1.0], "linear")])
def test_what_cannot_be_chosen_is_refused(run, stream, values, head):
    with pytest.raises(pt.ConfigError):
        accuracy_by_scale(run, stream, values, head=head)


def test_a_language_model_is_read_by_its_own_head(tiny_lm, word_stream, tmp_path):
    stream = pt.load_stream(word_stream, tasks=TASKS[:2], pose="instruction", validation_share=0.25).on_validation()
    model, options = tiny_lm("llama"), {"training": {**TRAINING, "max_steps": 4}}
    pt.Learner(model, "task_arithmetic", tmp_path / "r", **options).learn(stream)
    found = accuracy_by_scale(tmp_path / "r", stream, [0.0, 0.3, 2.0])
    for scale in (0.3, 2.0):
        recipe = {"name": "task_arithmetic", "scale": scale}
        result = pt.Learner(model, recipe, tmp_path / str(scale), **options).learn(stream)
        assert found[scale] == pytest.approx(result.matrix("language", "class").values[-1].mean())
    base = pt.Learner(model, "frozen_label_text", tmp_path / "base").learn(stream)
    assert found[0.0] == pytest.approx(base.matrix("language", "class").values[-1].mean())
    with pytest.raises(pt.ConfigError, match="cannot read a language model"):
        accuracy_by_scale(tmp_path / "r", stream, head="ncm")
