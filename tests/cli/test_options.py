"""Options, YAML keys and the reference follow from one declaration; what a command line gives reaches the settings."""

from __future__ import annotations

import shlex

import pytest
import typer
import yaml
from typer.testing import CliRunner

from perpetune.cli.options import configured
from perpetune.core.errors import ConfigError
from perpetune.learning.config import CompareConfig, RunConfig, load_config, settings_reference
from perpetune.learning.settings import PANELS, bare, settings_of

KINDS = {"run": RunConfig, "compare": CompareConfig}
# as they were before options were made from the models
EARLIER = {
    "both": "model stream data heads out tasks scenario split-by classes-per-task train-limit test-limit validation"
    " drift told pose epochs batch-size learning-rate set max-length pooling evaluate-every device import",
    "run": "recipe seed",
    "compare": "recipes seeds controls jobs",
}


def parsed(command: str, *arguments: str):
    """The configuration that a command of this kind is called with."""
    found = []
    app = typer.Typer()

    @configured(KINDS[command], command)
    def taken(settings, more: int = 0) -> None:
        """Takes."""
        found.append(settings)

    app.command()(taken)
    result = CliRunner().invoke(app, list(arguments), standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return found[0]


def at(config, path):
    for key in path:
        config = config[key] if isinstance(config, dict) else getattr(config, key)
    return config


@pytest.mark.parametrize("command", KINDS)
def test_every_setting_is_an_option_and_its_example_is_one_that_it_takes(command):
    settings = settings_of(KINDS[command], command)
    assert len(settings) > 30
    arguments, boolean = [], []
    for s in settings:
        if bare(s.annotation) is bool:
            boolean.append(s)
            arguments.append(s.option if not s.default else f"--no-{s.option[2:]}")
        else:
            assert s.example, f"{s.name} teaches no example"
            arguments += [s.option, *shlex.split(s.example)]
    config = parsed(command, *arguments)
    for s in settings:
        assert at(config, s.path) is not None, s.name
    assert all(at(config, s.path) is not s.default for s in boolean)
    assert config.stream.columns == {"sentence": "text", "category": "label"}
    assert config.stream.relabel == {"very positive": "positive", "neutral": None}
    assert config.stream.training == {"news": {"num_train_epochs": 5}}
    assert config.stream.drift.length == (150, 400)
    again = load_config(None, KINDS[command], yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"))))
    assert again == config


def test_no_option_stands_for_two_settings_and_none_was_lost():
    for command, kind in KINDS.items():
        options = [s.option for s in settings_of(kind, command)]
        assert len(set(options)) == len(options)
        assert {f"--{name}" for name in f"{EARLIER['both']} {EARLIER[command]}".split()} <= set(options)


def test_what_a_file_can_say_a_command_can_say():
    """All but what is refused in any case."""
    alone = [s.name for s in settings_reference() if not s.commands]
    assert alone == ["stream.trust_remote_code"]


def test_the_reference_tells_all_that_a_page_needs():
    reference = {s.name: s for s in settings_reference()}
    assert all(s.description.endswith(".") and s.panel in PANELS and s.type for s in reference.values())
    assert [s.panel for s in reference.values()] == sorted((s.panel for s in reference.values()), key=PANELS.index)
    limit = reference["stream.train_limit"]
    assert (limit.option, limit.type, limit.default, limit.panel) == ("--train-limit", "whole number", None, "Data")
    assert reference["stream.scenario"].type == "class | domain | task"
    assert reference["training.learning_rate"].option == "--learning-rate"
    assert reference["seeds"].commands == ("compare",) and reference["seeds"].default == [0]


def test_lists_and_mappings_are_given_with_commas_or_again():
    one = parsed("run", "--stream", "x", "--heads", "linear, ridge", "--columns", "a=text,b=label", "--tasks", "p")
    two = parsed(
        "run", "--stream", "x", "--heads", "linear", "--heads", "ridge", "--columns", "a=text", "--columns", "b=label",
        "--tasks", "p",
    )  # fmt: skip
    assert one == two and one.heads == ["linear", "ridge"]
    assert parsed("run", "--stream", "x", "--relabel", "a, b=c").stream.relabel == {"a, b": "c"}  # a label with a comma
    assert parsed("run", "--stream", "x", "--columns", "1=label").stream.columns == {"1": "label"}
    assert parsed("run", "--stream", "x", "--tasks", "").stream.tasks is None  # an empty variable of a script


def test_settings_of_a_recipe_and_of_heads_on_the_command_line():
    config = parsed(
        "run", "--stream", "x", "--recipe", "{name: nlora, rank: 4}", "--heads", "ncm,{type: ridge, bits: 9}"
    )
    assert config.recipe == {"name": "nlora", "rank": 4} and config.heads == ["ncm", {"type": "ridge", "bits": 9}]
    config = parsed("compare", "--stream", "x", "--recipes", "lora,{name: nlora, rank: 4}", "--seeds", "0, 1")
    assert config.recipes == ["lora", {"name": "nlora", "rank": 4}] and config.seeds == [0, 1]


def test_training_settings_are_joined_and_the_plainest_wins():
    config = parsed(
        "run", "--stream", "x", "--epochs", "1", "--set", "num_train_epochs=2", "--set", "optim_args=a=1,b=2"
    )
    assert config.training == {"num_train_epochs": 2, "optim_args": "a=1,b=2"}


def test_options_win_over_the_file_key_by_key(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "stream: {source: x, train_limit: 5, columns: {a: text, b: label}, drift: {segments: 3, window: 9}}\n"
        "training: {warmup_steps: 1, num_train_epochs: 3}\nrecipe: {name: nlora, rank: 4}\nheads: [ridge]\n",
        encoding="utf-8",
    )
    assert parsed("run", str(path)) == load_config(path, RunConfig, {})
    options = ["--epochs", "1", "--columns", "b=image", "--drift", "4", "--recipe", "lora", "--heads", "ncm"]
    config = parsed("run", str(path), *options)
    assert config.training == {"warmup_steps": 1, "num_train_epochs": 1}
    assert config.stream.columns == {"a": "text", "b": "image"} and config.stream.train_limit == 5
    assert (config.stream.drift.segments, config.stream.drift.window) == (4, 9)
    assert config.recipe == "lora" and config.heads == ["ncm"]  # these as a whole
    assert parsed("run", str(path), "--recipe", "{name: sotu}").recipe == {"name": "sotu"}


def test_a_recipe_that_is_given_by_name_keeps_the_settings_of_the_file(tmp_path):
    low, high = {"name": "nlora", "rank": 4}, {"name": "nlora", "rank": 16}
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"stream": "x", "recipes": ["lora", low, high]}), encoding="utf-8")
    assert parsed("compare", str(path), "--recipes", "nlora,olora").recipes == [low, high, "olora"]
    assert parsed("compare", str(path), "--recipes", "{name: nlora}").recipes == [{"name": "nlora"}]
    path.write_text(yaml.safe_dump({"stream": "x", "recipe": low}), encoding="utf-8")
    assert parsed("run", str(path), "--recipe", "nlora").recipe == low
    assert parsed("run", str(path), "--recipe", "lora").recipe == "lora"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--columns", "a"], "--columns takes name=value, not `a`"),
        (["--drift-length", "1,x"], "--drift-length takes whole numbers"),
        (["--drift-length", "{1: 2}"], "--drift-length takes whole numbers, 0,1,2, not"),
        (["--drift-length", "1"], "setting `stream.drift.length"),
        (["--set", "x=["], "--set cannot be read"),
        (["--heads", "{"], "--heads cannot be read"),
        (["--scenario", "klass"], "setting `stream.scenario`: Input should be 'class', 'domain' or 'task'"),
        (["--train-limit", "0"], "setting `stream.train_limit`"),
        (["--pooling", "sum"], "setting `pooling`"),
    ],
)
def test_what_cannot_be_read_is_named(arguments, message):
    with pytest.raises(ConfigError) as error:
        parsed("run", "--stream", "x", *arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stream: 5", "setting `stream`"),
        ("stream:", "no stream is given"),
        ("stream: {source: x, drift: 5}", "setting `stream.drift`"),
        ("stream: {source: x, drift: {windows: 5}}", "did you mean `window`"),
        ("stream: x\ntraining: 5", "setting `training`"),
        ("stream: x\n1: 5", "setting `1`: Keys should be strings"),
        ("stream: x\nrecipe: [", "is no YAML"),
        ("", "must hold settings"),
    ],
)
def test_a_file_that_is_wrong_is_one_line(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load_config(path, RunConfig, {"training": {"learning_rate": 1}, "stream": {"seed": 2}} if "5" in text else {})
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_file_of_another_editor_is_read(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes("stream: {source: x, tasks: [Übung]}".encode("utf-8-sig"))
    assert load_config(path, RunConfig, {}).stream.tasks == ["Übung"]
