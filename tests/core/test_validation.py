"""What a file holds where a piece or one of its settings is wanted."""

from __future__ import annotations

import json
import re

import pytest

from perpetune import ConfigError
from perpetune.core.validation import as_written, call_checked
from perpetune.recipes import RECIPES, make_recipe
from perpetune.routers import make_router

NO_PIECES = [None, True, 1, 0.5, [], [1], ["a", "b"], [[]], {}, {"a": 1}, {1: 2}, {"type": 1}, {"type": None}]
SLOTS = {  # where a piece stands in a recipe: a recipe that has it, and the way to it
    "head": ("anacp", ("heads", 0)),
    "router": ("default", ("consolidation", "router")),
    "`keep` of DeltaMerge": ("ties", ("consolidation", "keep")),
    "`combine` of DeltaMerge": ("ties", ("consolidation", "combine")),
    "tuner": ("lora", ("tuner",)),
    "rule": ("olora", ("rules", 0)),
}


def test_a_piece_is_its_name_or_a_mapping():
    assert as_written("head", "ridge") == ("ridge", {})
    assert as_written("head", {"shards": 4, "type": "ridge"}) == ("ridge", {"shards": 4})
    assert make_router({"type": "LDARouter", "features": 64}).features == 64


@pytest.mark.parametrize("slot", SLOTS)
def test_anything_else_is_refused_in_one_line(slot):
    name, (*way, last) = SLOTS[slot]
    for wrong in NO_PIECES:
        recipe = json.loads(json.dumps(make_recipe(name).to_dict()))
        place = recipe
        for step in way:
            place = place[step]
        place[last] = wrong
        with pytest.raises(ConfigError, match=re.escape(f"a {slot} is written as its name, or as")):
            make_recipe(recipe)


@pytest.mark.parametrize(
    ("setting", "wrong"),
    [("layers", [[]]), ("prior", "yes"), ("candidates", None), ("mass", {}), ("holdout", "a"), ("features", 1)],
)
def test_settings_that_a_piece_inherits_are_checked_too(setting, wrong):
    """The annotations of `PerTask` use names that the module of `WeighedPerTask` does not have."""
    kind = type(make_recipe("default").consolidation)
    with pytest.raises(ConfigError, match=f"`{setting}` = "):
        call_checked(kind.__name__, kind, {setting: wrong})


@pytest.mark.parametrize("name", RECIPES)
def test_no_setting_of_a_recipe_takes_everything(name):
    """Each is checked, or refused by the piece itself: a mapping that nobody wants is never an error of Python."""
    whole = json.loads(json.dumps(make_recipe(name).to_dict()))
    for part in (whole["consolidation"], *whole["rules"], *whole["heads"]):
        for setting in part:
            before, part[setting] = part[setting], {"nobody": ["wants", "this"]}
            with pytest.raises(ConfigError):
                make_recipe(whole)
            part[setting] = before
