"""The ledger says what is true now."""

from __future__ import annotations

import pytest

from docs import make_ledger
from perpetune.recipes import RECIPES


def test_the_ledger_is_up_to_date():
    written = make_ledger.LEDGER.read_text(encoding="utf-8")
    assert written == make_ledger.ledger(), "run: python docs/make_ledger.py"


def test_every_recipe_has_its_promise_its_equation_and_what_it_was_compared_with():
    page = make_ledger.ledger()
    for name in RECIPES:
        part = page.split(f"### `{name}`\n")[1].split("\n##")[0]
        assert "**Promise.**" in part and part.count("::test_") >= 2 and "**Tables.**" in part, name
        # "as released" is a claim about released code, so that what differs must be said
        assert not name.endswith("_released") or "**Compared.**" in part, name
    assert "configs/benchmarks/sotu_vit.yaml" in page and "routing accuracy" in page and "LLaVA" in page


def test_a_row_may_be_like_another():
    rows = {"a": {"promise": "p", "held_by": [], "equation": []}, "b": {"like": "a", "promise": "q"}}
    assert make_ledger.row("b", rows) == {"promise": "q", "held_by": [], "equation": []}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ({}, "no row for the recipe `lora`"),
        ({"lora": {"promise": "p"}}, "row of `lora` needs"),
        ({"lora": {"promise": "p", "held_by": [], "equation": [], "proof": ""}}, "no other key"),
    ],
)
def test_a_row_that_is_missing_or_not_whole(rows, words):
    with pytest.raises(SystemExit, match=words):
        make_ledger.row("lora", rows)


def test_a_test_that_is_not_there_stops_the_ledger():
    with pytest.raises(SystemExit, match="no such test"):
        make_ledger.tests(["rules/test_projection.py::test_of_nothing"])
    with pytest.raises(SystemExit, match="no recipe"):
        make_ledger.recipes({"nobody": {}})
