from __future__ import annotations

import shlex

import pytest
import typer
from typer.testing import CliRunner

from perpetune.cli.options import configured, make_command
from perpetune.learning.config import CompareConfig, RunConfig

NLORA = {"name": "nlora", "rank": 4}


def read_back(line):
    """The settings that the options of a command line stand for."""
    found = []

    @configured(RunConfig, "run")
    def run(settings: RunConfig) -> None:
        found.append(settings)

    app = typer.Typer()
    app.command()(run)
    result = CliRunner().invoke(app, shlex.split(line)[2:])
    assert result.exit_code == 0, result.output
    return found[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"model": "m", "stream": {"source": "my tasks/", "validation_share": 0.3}},
        {"model": "m", "stream": {"source": "s", "tasks": ["a", "b"], "train_limit": 5}, "max_length": 32},
        {"stream": {"source": "s", "relabel": {"good": "fine", "so so": None}}, "heads": ["linear", "ridge"]},
        {"stream": {"source": "s"}, "heads": ["linear", {"type": "ridge", "features": 0}], "trust_remote_code": True},
        {"stream": {"source": "s"}, "training": {"num_train_epochs": 2, "warmup_steps": 3, "optim": "sgd"}},
    ],
    ids=str,
)
def test_a_command_stands_for_the_settings_that_it_was_made_from(settings):
    line = make_command(RunConfig, "run", CompareConfig.model_validate(settings), recipe=NLORA)
    assert line.startswith("perpetune run ") and "--recipe '{name: nlora, rank: 4}'" in line
    assert read_back(line) == RunConfig.model_validate({**settings, "recipe": NLORA})


def test_what_is_the_default_is_not_written():
    config = CompareConfig.model_validate({"model": "m", "stream": {"source": "s", "seed": 0}, "out": "x"})
    assert make_command(RunConfig, "run", config, out=None) == "perpetune run --model m --stream s"
