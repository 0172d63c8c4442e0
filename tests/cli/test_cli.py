"""The command line as a user meets it: it teaches, it writes what it says, and it never shows a traceback."""

from __future__ import annotations

import json
import shutil

import pytest

from perpetune.core.errors import ConfigError
from perpetune.learning.config import CompareConfig, RunConfig, load_config
from perpetune.metrics.conventions import CONVENTIONS
from perpetune.metrics.records import read_records
from perpetune.operations.compare import found_records, head_groups, with_controls
from perpetune.recipes import controls
from tests.calling import call

SMALL = ["--epochs", "1", "--batch-size", "8"]


@pytest.fixture
def perpetune(monkeypatch, capsys):
    return lambda *arguments: call(monkeypatch, capsys, *arguments)


def test_run_log_and_report(perpetune, tiny_bert, word_stream, tmp_path):
    out = tmp_path / "run"
    options = ["--model", tiny_bert(), "--stream", word_stream, "--recipe", "olora", "--out", out, *SMALL]
    code, printed, err = perpetune("run", *options, "--heads", "linear,ncm", "--json", tmp_path / "r.json")
    assert code == 0, err
    assert "final accuracy" in printed and "kept: Merge" in printed
    page = (out / "report" / "index.html").read_text()
    assert "olora" in page and "http://" not in page
    records = read_records(tmp_path / "r.json")
    assert {(r.head, r.scenario) for r in records} == {(h, s) for h in ("linear", "ncm") for s in ("class", "task")}
    code, printed, _ = perpetune("log", out)
    assert code == 0 and all(task in printed for task in ("films", "mood", "news"))
    for convention in CONVENTIONS:  # with one task some figures are undefined
        code, printed, err = perpetune("report", out, "--convention", convention)
        assert code == 0 and f"{convention} · head ncm · task: " in printed, err
    assert "undefined" in perpetune("report", out, "--convention", "gem")[1]
    code, printed, _ = perpetune("report", out, "--geometry", "1e-4")
    assert code == 0 and "average_collision_rate" in printed and "tolerance 0.0001" in printed
    code, printed, _ = perpetune("run", *options, "--heads", "linear,ncm")  # again: nothing left to do
    assert code == 0 and len(list((out / "commits").iterdir())) == 4


def test_compare_adds_the_controls_and_survives_a_recipe_that_cannot_run(
    perpetune, tiny_bert, word_stream, tmp_path, monkeypatch
):
    for ridge in (controls.tfidf_ridge, controls.frozen_ridge):
        monkeypatch.setattr(ridge, "__defaults__", (64,))  # columns: a ridge of their thousands takes seconds
    out = tmp_path / "compare"
    # ||A B||_1 of the released code needs square layers; the feed-forward layers are not
    config = tmp_path / "c.yaml"
    config.write_text(
        f"model: {tiny_bert(width=16, layers=1)}\nout: {out}\nseeds: [0, 1]\nheads: [linear, ncm]\n"
        f"stream: {{source: {word_stream}, tasks: [films, news], train_limit: 16}}\n"
        "recipes: [lora, {name: nlora_released, target: [intermediate.dense]}]\n"
        "training: {num_train_epochs: 1, per_device_train_batch_size: 8}\n"
    )
    code, printed, err = perpetune("compare", config)
    assert code == 1 and "square" in err
    assert [line for line in err.splitlines() if "│ nlora_released seed 1 (linear) │ " in line], err
    records = read_records(out / "results.json")
    assert {r.recipe for r in records} == {"lora", "sequential", "joint", "frozen_ridge", "tfidf_ridge"}
    assert {r.seed for r in records} == {0, 1}
    assert (out / "report" / "index.html").is_file() and "lora" in printed
    _, printed, _ = perpetune("report", out, "--convention", "trace")
    assert printed.count("trace · lora seed 0 · head linear · class: ") == 1
    code, _, err = perpetune("report", out, "--geometry", "1e-4")
    assert code == 2 and "is a comparison: --geometry is for one of its runs" in err
    lora = next(r for r in records if r.recipe == "lora" and r.head == "linear")
    assert lora.intransigence is not None
    assert next(r for r in records if r.recipe == "joint").intransigence is None


def test_a_comparison_that_was_stopped_is_reported_as_far_as_it_came(perpetune, tiny_bert, word_stream, tmp_path):
    options = ["--model", tiny_bert(), "--stream", word_stream, "--out", tmp_path / "c", *SMALL]
    code, _, _ = perpetune("compare", *options, "--recipes", "frozen_ncm,joint", "--no-controls")
    assert code == 0
    whole = {(r.recipe, r.head, r.scenario): r.final_accuracy for r in read_records(tmp_path / "c" / "results.json")}
    (tmp_path / "c" / "results.json").unlink()
    shutil.rmtree(tmp_path / "c" / "joint")
    (tmp_path / "c" / "report" / "index.html").unlink()
    code, printed, err = perpetune("report", tmp_path / "c")
    assert code == 0 and "frozen_ncm" in printed, err
    assert "frozen_ncm" in (tmp_path / "c" / "report" / "index.html").read_text()
    found = {(r.recipe, r.head, r.scenario): r.final_accuracy for r in found_records(tmp_path / "c")}
    assert found == {key: value for key, value in whole.items() if key[0] == "frozen_ncm"}


def test_every_recipe_gets_the_same_steps(perpetune, tiny_bert, word_stream, tmp_path):
    """Also where the rows of a task fill no whole number of batches: 20 rows are 3 batches of 8, 60 rows are 8."""
    options = ["--model", tiny_bert(), "--stream", word_stream, "--out", tmp_path / "c", "--train-limit", "20", *SMALL]
    code, _, err = perpetune("compare", *options, "--recipes", "lora,replay,joint,sequential", "--no-controls")
    assert code == 0, err
    records = json.loads((tmp_path / "c" / "results.json").read_text())
    records = records["records"] if isinstance(records, dict) else records
    assert {r["steps"] for r in records} == {9}


def test_plan_says_what_a_run_will_take_and_keeps_nothing(perpetune, tiny_bert, word_stream, tmp_path):
    out = tmp_path / "run"
    options = ["--model", tiny_bert(), "--stream", word_stream, "--recipe", "lora", "--out", out, *SMALL]
    code, printed, _ = perpetune("run", *options, "--plan")
    assert code == 0 and not out.exists()
    assert all(word in printed for word in ("trainable parameters", "memory", "disk", "time", " 9 steps"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--stream", "digits", "--recipe", "nlroa"], "no recipe is called `nlroa`: did you mean `nlora`"),
        (["run", "--recipe", "lora"], "no stream is given"),
        (["run", "--stream", "digitz"], "digitz"),
        (["run", "nowhere.yaml"], "there is no file nowhere.yaml"),
        (["run", "--stream", "digits", "--recipe", "lora"], "needs a model"),
        (["run", "--stream", "digits", "--model", "no/where", "--recipe", "lora"], "cannot load `no/where`"),
        (["run", "--stream", "digits", "--set", "warmup"], "--set takes name=value"),
        (["compare", "--stream", "digits", "--seeds", "one"], "whole numbers"),
        (["list", "recipe"], "did you mean `recipes`"),
        (["log", "nowhere"], "is no run"),
        (["report", "nowhere"], "is no run"),
    ],
)
def test_errors_are_one_line(perpetune, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = perpetune(*arguments)
    assert code == 2 and message in err and err.count("\n") == 1 and err.startswith("perpetune: ")


def test_a_target_that_is_not_there_is_explained(perpetune, tiny_vit, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(
        f"model: {tiny_vit()}\nstream: {{source: digits, train_limit: 20, test_limit: 10}}\nout: {tmp_path / 'r'}\n"
        "recipe: {tuner: {type: LoraConfig, r: 4, target_modules: [query]}, consolidation: Merge}\n"
    )
    code, _, err = perpetune("run", config)
    assert code == 2 and "no module is called `query`; this ViTModel calls it `q_proj`" in err


def test_a_rule_without_lora_is_explained(perpetune, tiny_bert, word_stream, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(
        f"model: {tiny_bert()}\nstream: {word_stream}\nout: {tmp_path / 'r'}\n"
        "recipe: {tuner: AllWeights, rules: [{type: ProductL1, strength: 0.1}]}\n"
    )
    code, _, err = perpetune("run", config)
    assert code == 2 and "ProductL1" in err and "LoRA" in err


@pytest.mark.parametrize(
    "what", ["recipes", "tuners", "heads", "rules", "consolidations", "routers", "streams", "benchmarks"]
)
def test_lists_teach(perpetune, what):
    code, out, _ = perpetune("list", what)
    assert code == 0 and len(out.splitlines()) > 3


def test_validation_share_never_touches_the_test_data(perpetune, tiny_bert, word_stream, tmp_path):
    options = ["--model", tiny_bert(), "--stream", word_stream, "--recipe", "frozen_ncm", "--out", tmp_path / "r"]
    code, _, err = perpetune("run", *options, "--validation", "0.25", "--json", tmp_path / "r.json")
    assert code == 0, err
    sizes = set(read_records(tmp_path / "r.json")[0].test_sizes)
    assert sizes == {6}  # a quarter of 24 training rows, not 12 test rows


def test_configuration_is_checked_at_the_door(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("stream: {source: digits, trian_limit: 3}")
    with pytest.raises(ConfigError, match="did you mean `train_limit`"):
        load_config(path, RunConfig, {})
    path.write_text("stream: digits\nsed: 1")
    with pytest.raises(ConfigError, match="`sed`: did you mean `seed`"):
        load_config(path, RunConfig, {})
    path.write_text("stream: digits\njobs: zero")
    with pytest.raises(ConfigError, match="setting `jobs`"):
        load_config(path, CompareConfig, {})
    path.write_text("- just\n- a list")
    with pytest.raises(ConfigError, match="must hold settings"):
        load_config(path, RunConfig, {})
    path.write_text("stream: [")
    with pytest.raises(ConfigError, match="is no YAML"):
        load_config(path, RunConfig, {})


def test_heads_that_train_alike_share_a_run():
    assert head_groups(["linear", "ridge", "label_text", "ncm"]) == [("linear", "ridge", "ncm"), ("label_text",)]
    assert head_groups(["ridge", "ncm"]) == [("ridge", "ncm")]
    assert head_groups(["linear_seen", "ridge"]) == [("linear_seen",), ("ridge",)]


def test_controls_are_added_once():
    found = with_controls(["lora", {"name": "joint", "rank": 4}], "image", ["linear"])
    assert found == ["lora", {"name": "joint", "rank": 4}, "sequential", "frozen_ridge", "pixels_ridge"]
