from __future__ import annotations

import shlex

import pytest

from perpetune.cli.options import make_command, nested
from perpetune.learning.config import CompareConfig, RunConfig
from perpetune.learning.settings import settings_of


def read_back(line):
    """The settings that the options of a command line stand for."""
    words = shlex.split(line)[2:]
    by_option = {s.option: s for s in settings_of(RunConfig, "run") if s.option}
    given: dict = {}
    while words:
        setting = by_option[words.pop(0)]
        many = "mapping" in setting.type or "list" in setting.type
        text = words.pop(0)
        given[setting.name] = [*given.get(setting.name, []), text] if many else text
    return nested((s, given.get(s.name)) for s in by_option.values())


@pytest.mark.parametrize(
    "settings",
    [
        {"model": "m", "stream": {"source": "my tasks/"}},
        {"model": "m", "stream": {"source": "s", "tasks": ["a", "b"], "train_limit": 5}, "max_length": 32},
        {"stream": {"source": "s", "relabel": {"good": "fine", "so so": None}}, "heads": ["linear", "ridge"]},
        {"stream": {"source": "s"}, "training": {"num_train_epochs": 2, "warmup_steps": 3, "optim": "sgd"}},
    ],
    ids=str,
)
def test_a_command_stands_for_the_settings_that_it_was_made_from(settings):
    line = make_command(RunConfig, "run", CompareConfig.model_validate(settings), recipe={"name": "nlora", "rank": 4})
    found = RunConfig.model_validate(read_back(line) | {"recipe": {"name": "nlora", "rank": 4}})
    assert found == RunConfig.model_validate(settings | {"recipe": {"name": "nlora", "rank": 4}})
    assert "--recipe '{name: nlora, rank: 4}'" in line


def test_what_is_the_default_is_not_written():
    config = CompareConfig.model_validate(
        {"model": "m", "stream": {"source": "s", "seed": 0}, "seeds": [1], "out": "x"}
    )
    assert make_command(RunConfig, "run", config, out=None) == "perpetune run --model m --stream s"
