"""The ready configurations: each can be read, names recipes that there are, and its stream is built from small data."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

from perpetune.cli import app as cli
from perpetune.heads import make_head
from perpetune.learning.config import CompareConfig, load_config
from perpetune.recipes import make_recipe
from perpetune.recipes.user_pieces import import_modules
from perpetune.streams import load_stream
from perpetune.streams.benchmarks import BENCHMARKS

pytestmark = pytest.mark.filterwarnings("ignore:.*published size:UserWarning")

ROOT = Path(__file__).resolve().parents[3] / "configs"
CONFIGS = sorted(ROOT.rglob("*.yaml"))
TEXT = [path for path in CONFIGS if re.search(r"source: (cl-order-\d|trace|superni)", path.read_text())]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_configuration_can_be_read(path: Path) -> None:
    config = load_config(path, CompareConfig, {})
    import_modules(config.imports)
    for spec in config.recipes:
        recipe = make_recipe(spec)
        assert recipe.with_heads(recipe.heads).name == (spec if isinstance(spec, str) else spec["name"])
    header = path.read_text().split("\nmodel:")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    commands = re.findall(
        r"^# ((?:perpetune (?:compare|run)|python -m benchmarks\.questions) .*)$", header, re.MULTILINE
    )
    assert commands and all(f"configs/{path.relative_to(ROOT)}" in command for command in commands)
    for command in commands:
        named = re.search(r"--stream (\S+)", command)
        if ROOT / "benchmarks" in path.parents and named:
            assert named[1] in BENCHMARKS


def test_zero_shot_and_tuned_clip_read_the_same_sentences() -> None:
    """A recipe that trains nothing is read with its own head, not with those of the comparison."""
    config = load_config(ROOT / "benchmarks" / "clip_cifar100.yaml", CompareConfig, {})
    (zero_shot,) = make_recipe(config.recipes[0]).heads
    (tuned,) = map(make_head, config.heads or ())
    assert zero_shot.name == tuned.name == "contrastive" and zero_shot.config() == tuned.config()


@pytest.mark.parametrize("path", TEXT, ids=lambda path: path.stem)
def test_its_stream_is_built(path: Path, request: pytest.FixtureRequest) -> None:
    settings = load_config(path, CompareConfig, {}).stream
    kind = {"cl": "cl_benchmark", "trace": "trace", "superni": "sapt"}[settings.source.split("-")[0]]
    names = [name for name in BENCHMARKS if name.split("-")[0] == settings.source.split("-")[0]]
    data = request.getfixturevalue(kind)
    for name in {settings.source, names[-1]}:  # every order: test_cl_text.py, test_instructions.py
        stream = settings.model_copy(update={"source": name, "data": str(data)}).load()
        assert len(stream) == len(load_stream(name, data=data)) and stream.inputs == ("prompt",)


def test_one_command_from_a_folder_to_a_table(cl_benchmark, tiny_lm, tmp_path, monkeypatch, capsys) -> None:
    def perpetune(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["perpetune", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        assert not stop.value.code, err
        return out

    monkeypatch.chdir(tmp_path)
    heads = "heads: [{type: language_generated, longest: 6}]"  # untrained, a model does not stop
    (tmp_path / "heads.yaml").write_text(heads)
    run = [
        "run",
        "heads.yaml",
        "--model",
        tiny_lm("t5"),
        "--stream",
        "cl-order-1",
        "--data",
        "CL_Benchmark",
        "--pose",
        "published",
    ]
    run += ["--recipe", "olora", "--epochs", 1, "--test-limit", 3, "--out", "run"]
    perpetune(*run, "--tasks", "dbpedia,amazon")
    assert len(list((tmp_path / "run" / "commits").iterdir())) == 3
    printed = perpetune(*run)  # all four: it goes on where it stopped
    assert "final accuracy" in printed and len(list((tmp_path / "run" / "commits").iterdir())) == 5
    source = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())["stream"]["source"]
    assert source["data"] == str(cl_benchmark) and source["source"] == "cl-order-1"
    cl_benchmark.rename(tmp_path / "moved")
    perpetune("revert", "run", "amazon", "--stream", tmp_path / "moved")
