"""Pages say what is true: figures stand in the tables that they name, links lead somewhere, no paper is left out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs import make_reference
from perpetune.learning.config import settings_reference
from perpetune.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"])
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")
FIGURE = re.compile(r"\[(\d+\.\d)\]\(([^)]*results/\w+\.md)\)")


def rows_with_figures(page: Path) -> list[tuple[str, str, str]]:
    """(recipe, figure, results page) of every figure in the rows of the tables of recipes."""
    found = []
    for line in page.read_text(encoding="utf-8").splitlines():
        recipe = next((name for name in re.findall(r"`(\w+)`", line) if name in RECIPES), "")
        found += [(recipe, figure, (page.parent / at).resolve().as_posix()) for figure, at in FIGURE.findall(line)]
    return found


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "how-to" / "choose-a-recipe.md"], ids=lambda p: p.stem)
def test_figures_stand_in_the_tables_that_they_name(page):
    figures = rows_with_figures(page)
    assert len(figures) > 15
    for recipe, figure, results in figures:
        lines = Path(results).read_text(encoding="utf-8").splitlines()
        rows = [line for line in lines if line.startswith(f"| {recipe} ")]
        assert any(re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", row) for row in rows), (recipe, figure, results)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    made = {(DOCS / path).resolve() for path in make_reference.pages()}
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if not link.startswith("http"):
            target = (page.parent / link).resolve()
            assert target.exists() or target in made, f"{page.name}: {link}"


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("nav:")[1]))
    there = {p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md")} | set(make_reference.pages())
    assert listed == there


def test_the_index_by_paper_has_a_title_for_every_paper():
    found = make_reference.papers()
    missing = set(found) - set(make_reference.TITLES)
    assert not missing, f"add to PAPERS in src/perpetune/recipes/papers.py: {', '.join(sorted(missing))}"
    assert found["2310.14152"][0][:2] == ["olora", "olora_released"]
    assert "SubspaceProjection" in found["2405.13383"][1]
    assert "sotu_disjoint" in found["2411.02813"][0] and "color_adapted" in found["2311.17601"][0]


def test_the_reference_is_that_of_the_code():
    settings = make_reference.settings_page()
    assert "| `stream.validation_share` | `--validation` | number | `0.0` |" in settings
    assert "| `evaluate_every` | `--evaluate-every` | whole number | `1` |" in settings
    assert all(f"| `{setting.name}` |" in settings for setting in settings_reference())
    recipes = make_reference.recipes_page()
    assert all(f"## `{name}`\n" in recipes for name in RECIPES)
    assert "[2410.10179](https://arxiv.org/abs/2410.10179)" in recipes and "`strength=0.0001`" in recipes
    assert "subspace_projection" in make_reference.pieces_page()
    assert "::: perpetune.rules.projection.SubspaceProjection" in make_reference.api_page(*make_reference.API["rules"])
