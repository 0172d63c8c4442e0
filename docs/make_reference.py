"""Pages that are made of the code when the site is built: settings, recipes, pieces, the API, the index by paper.

    python docs/make_reference.py         lays all pages into build/docs, for `zensical build`
    python docs/make_reference.py --sew   ties up the built site: its search takes the script that stands in docs/vendor

`make docs` runs both, and zensical between them. Nothing that is made here is written into docs/.
"""

from __future__ import annotations

import inspect
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))  # a checkout that is not installed has its own pages

from pydantic_core import PydanticUndefined  # noqa: E402

import perpetune  # noqa: E402
from perpetune.cli.catalogue import catalogue  # noqa: E402
from perpetune.cli.kinds import KINDS  # noqa: E402
from perpetune.learning.config import settings_reference  # noqa: E402
from perpetune.recipes import RECIPES  # noqa: E402
from perpetune.recipes.papers import ARXIV, PAPERS, papers_of_recipe  # noqa: E402

# page of the reference -> (title, what it holds, the rooms whose public names stand on it)
API = {
    "learner": ("Learner and Result", "Learn a stream, predict, export; read what a run found.", ("learning", "runs")),
    "streams": ("Streams", "Where data comes in.", ("streams",)),
    "rules": ("Rules", "How each optimizer step is shaped, and how a rule hangs on any optimizer.", ("rules",)),
    "tuners": (
        "Tuners",
        "Where the change lives. Any configuration of peft is a tuner; these are the ones that peft lacks.",
        ("tuners",),
    ),
    "consolidation": ("Consolidation", "What a finished task leaves behind.", ("consolidation",)),
    "routers": ("Routers", "Which task an input belongs to, and where a new task begins.", ("routers",)),
    "heads": ("Heads", "How a prediction is read off the model.", ("heads",)),
    "errors": ("Errors and measurements", "What a user can mend, and what was measured of a promise.", ("core",)),
}
SHIM = "https://unpkg.com/iframe-worker/shim"
TITLES = {number: paper.title for number, paper in PAPERS.items()}


def cell(text: str) -> str:
    """Text for a cell of a table: no line breaks, no bars, nothing that HTML takes for a tag."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def linked(text: str) -> str:
    return ARXIV.sub(r"[\1](https://arxiv.org/abs/\1)", text)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    return lines + [f"| {' | '.join(map(cell, row))} |" for row in rows] + [""]


def settings_page() -> str:
    """Every setting, from the models that check it; the options of the command line are made from the same."""
    lines = [
        "# Settings",
        "",
        "What a YAML file for `perpetune run` and `perpetune compare` may hold. A dot is a level:",
    ]
    lines += ["`stream.source` is `source:` under `stream:`. The option on the command line wins over the file.", ""]
    panels: dict[str, list[tuple[str, ...]]] = {}
    for s in settings_reference():
        option = f"`{s.option}`" if s.option else ""
        only = f" (`{s.commands[0]}` alone)" if len(s.commands) == 1 else ""
        default = "" if s.default in (None, PydanticUndefined) else f"`{s.default!r}`"
        about = s.description + (f" Example: `{s.example}`." if s.example else "")
        panels.setdefault(s.panel, []).append((f"`{s.name}`", option + only, s.type, default, about))
    for panel, rows in panels.items():
        lines += [f"## {panel}", "", *table(("setting", "option", "type", "default", ""), rows)]
    lines += ["`stream:` may also be one word, the source. `training:` takes the names of"]
    lines += ["`transformers.TrainingArguments`, and `head_learning_rate`.", ""]
    return "\n".join(lines)


def _slots(recipe: Any) -> tuple[str, str, str, str]:
    tuner, consolidation = getattr(recipe.tuner, "config", recipe.tuner), recipe.consolidation
    router = f" with `{type(consolidation.router).__name__}`" if hasattr(consolidation, "router") else ""
    return (
        f"`{type(tuner).__name__}`",
        ", ".join(f"`{type(rule).__name__}`" for rule in recipe.rules),
        f"`{type(consolidation).__name__}`{router}",
        ", ".join(f"`{head.name}`" for head in recipe.heads),
    )


def recipes_page() -> str:
    """Every recipe with its slots, its settings and the whole of its docstring."""
    lines = ["# Recipes", "", "Made of the table in `perpetune.recipes`; `perpetune list recipes` prints it.", ""]
    slots = {name: _slots(make()) for name, make in RECIPES.items()}
    rows = [(f"[`{name}`](#{name})", *parts, ", ".join(papers_of_recipe(name))) for name, parts in slots.items()]
    lines += map(linked, table(("recipe", "tuner", "rules", "consolidation", "head", "paper"), rows))
    for name, make in RECIPES.items():
        recipe = make()
        doc = linked((inspect.getdoc(make) or "").replace("<", "&lt;"))
        settings = ", ".join(f"`{p.name}={p.default!r}`" for p in inspect.signature(make).parameters.values())
        lines += [f"## `{name}`", "", doc, ""]
        lines += [f"*Settings:* {settings or 'none'}.", ""]
        lines += [f"*Training:* `{recipe.training}`.", ""] if recipe.training else []
    return "\n".join(lines)


def pieces_page() -> str:
    lines = ["# Pieces", "", "What stands in the slots of a recipe, by the names that a configuration gives them;"]
    lines += ["`perpetune list KIND` prints the same.", ""]
    for kind in (name for name in KINDS if name != "recipes"):
        found = catalogue(kind)
        rows = [(f"`{row.name}`", row.about, f"`{row.settings}`" if row.settings else "") for row in found]
        what = f"{KINDS[kind].about[0].upper()}{KINDS[kind].about[1:]}"
        lines += [
            f"## {kind.capitalize()}",
            "",
            what,
            "",
            cell(KINDS[kind].use),
            "",
            *table(("name", "what it is", "settings"), rows),
        ]
    return linked("\n".join(lines))


def api_page(title: str, about: str, rooms: tuple[str, ...]) -> str:
    lines = [f"# {title}", "", f"{about} All names are imported from `perpetune`.", ""]
    for name, home in perpetune._HOME.items():
        found = getattr(perpetune, name)
        if home.split(".")[0] in rooms and hasattr(found, "__module__"):
            lines += [f"::: {found.__module__}.{found.__qualname__}", ""]
    return "\n".join(lines)


def pieces() -> Iterator[tuple[str, str]]:
    """(name, all that is written about it) of every piece of a slot."""
    from perpetune import tuners
    from perpetune.consolidation import CONSOLIDATIONS
    from perpetune.heads import HEADS
    from perpetune.routers import ROUTERS
    from perpetune.rules import RULES

    own = {name: getattr(tuners, name) for name in tuners.OWN_CONFIGS}
    for kind in (RULES, CONSOLIDATIONS, ROUTERS, HEADS, own):
        for piece in kind.values():
            yield piece.__name__, f"{piece.__doc__}\n{sys.modules[piece.__module__].__doc__}"


def papers() -> dict[str, tuple[list[str], list[str]]]:
    """arXiv number -> the recipes and the pieces that are made after the paper."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    for name in RECIPES:
        for number in papers_of_recipe(name):
            found.setdefault(number, ([], []))[0].append(name)
    for name, text in pieces():
        for number in ARXIV.findall(text):
            found.setdefault(number, ([], []))[1].append(name)
    return {number: found[number] for number in sorted(found)}


def papers_page() -> str:
    texts = {p: p.read_text(encoding="utf-8") for p in sorted((ROOT / "docs").rglob("*.md"))}
    rows = []
    for number, (recipes, parts) in papers().items():
        at = [p for p, text in texts.items() if number in text and p.name not in ("ledger.md", "glossary.md")]
        pages = [f"[{p.stem.replace('_', ' ')}](../{p.relative_to(ROOT / 'docs').as_posix()})" for p in at]
        links = [f"[`{r}`](../reference/recipes.md#{r})" for r in dict.fromkeys(recipes)]
        named = [f"`{p}`" for p in dict.fromkeys(parts)]
        paper = f"{TITLES.get(number, '')} [{number}](https://arxiv.org/abs/{number})"
        rows.append((paper, ", ".join(links), ", ".join(named), ", ".join(pages)))
    lines = ["# Index by paper", "", "The papers behind recipes and pieces, oldest first; of a `_released` recipe, the"]
    lines += ["paper whose code it follows. Papers of data sets and benchmarks: [published"]
    lines += ["benchmarks](../how-to/benchmarks.md).", ""]
    return "\n".join([*lines, *table(("paper", "recipes", "pieces", "pages"), rows)])


def pages() -> dict[str, str]:
    """Path in the site -> text, of all pages that are made here."""
    made = {f"reference/{name}.md": api_page(*what) for name, what in API.items()}
    for name in ("CHANGELOG", "CONTRIBUTING"):
        made[f"{name.lower()}.md"] = (ROOT / f"{name}.md").read_text(encoding="utf-8").replace("](docs/", "](")
    made["reference/settings.md"] = settings_page()
    made["reference/recipes.md"] = recipes_page()
    made["reference/pieces.md"] = pieces_page()
    made["explanation/papers.md"] = papers_page()
    return made


def lay(folder: Path) -> None:
    """All pages, written by hand and made here, into the folder that the site is built from."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(
        ROOT / "docs", folder, ignore=shutil.ignore_patterns("*.py", "*.json", "ledger.yaml", "__pycache__")
    )
    for path, text in pages().items():
        (folder / path).write_text(text, encoding="utf-8")


def sew(site: Path) -> None:
    """Every page of the site takes the shim of its search from the site itself, not from a host outside."""
    for page in site.rglob("*.html"):
        up = "../" * (len(page.relative_to(site).parts) - 1)
        text = page.read_text(encoding="utf-8")
        page.write_text(text.replace(SHIM, f"{up or './'}vendor/iframe-worker.js"), encoding="utf-8")


if __name__ == "__main__":
    sew(ROOT / "site") if "--sew" in sys.argv else lay(ROOT / "build" / "docs")
