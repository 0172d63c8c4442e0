"""Writes docs/ledger.md: for every recipe the tests of its promise and of its equation, what it was compared with, and
the tables that were made with which command; then metrics, models and configurations.

python docs/make_ledger.py          write it; the rows stand in docs/ledger.yaml
python docs/make_ledger.py --check  exit with 1 where it is not up to date
"""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))  # a checkout that is not installed has its own ledger

from perpetune.recipes import RECIPES  # noqa: E402

ROWS, LEDGER = ROOT / "docs" / "ledger.yaml", ROOT / "docs" / "ledger.md"
KEYS = ("promise", "held_by", "equation", "compared")
# every recipe is run, opened again and predicts the same
FOR_ALL = "learning/test_learner.py::test_every_recipe_learns_predicts_and_opens_again"
START = f"""# Ledger

What stands behind each recipe: the tests that hold it to its promise, the tests that hold it to its equation, the code
that it was compared with, and the tables in which it stands. `python docs/make_ledger.py` makes this page from
`docs/ledger.yaml`, checks that every test exists, and reads the tables. One more test runs every recipe but
`pixels_ridge` and `frozen_label_text`, opens the run again and compares the predictions: `tests/{FOR_ALL}`.
"""


@cache
def functions(path: str) -> frozenset[str]:
    file = ROOT / "tests" / path
    body = ast.parse(file.read_text(encoding="utf-8")).body if file.is_file() else []
    return frozenset(node.name for node in body if isinstance(node, ast.FunctionDef))


def tests(names: list[str]) -> str:
    """The tests as code.

    Raises:
        SystemExit: a name is no test, which stops the ledger.
    """
    for name in names:
        path, _, function = name.partition("::")
        if function not in functions(path):
            raise SystemExit(f"docs/ledger.yaml names tests/{name}, but there is no such test")
    return ", ".join(f"`tests/{name}`" for name in names)


def row(name: str, rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What stands behind a recipe, with what it takes from the one that it is `like`.

    Raises:
        SystemExit: there is no row, or one that lacks something.
    """
    if name not in rows:
        raise SystemExit(f"docs/ledger.yaml has no row for the recipe `{name}`: add one under `recipes`")
    given = dict(rows[name] or {})
    like = given.pop("like", None)
    found = {**(row(like, rows) if like else {}), **given}
    if set(found) - set(KEYS) or not set(found) >= set(KEYS[:3]):
        raise SystemExit(f"docs/ledger.yaml: the row of `{name}` needs promise, held_by and equation, and no other key")
    return found


def tables() -> dict[str, list[tuple[str, str]]]:
    """Recipe -> (page, its first command) of all results with a row for it."""
    found: dict[str, list[tuple[str, str]]] = {}
    for path in sorted((ROOT / "docs" / "results").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        command = re.search(r"^```\n(.+?)[ \\]*$", text, re.MULTILINE)
        named = set(re.findall(r"^\| `?(\w+)`?[ ,]", text, re.MULTILINE))
        for recipe in named & set(RECIPES) if command else ():
            found.setdefault(recipe, []).append((path.stem, command[1]))
    return found


def recipes(rows: dict[str, dict[str, Any]]) -> list[str]:
    made, lines = tables(), []
    unknown = set(rows) - set(RECIPES)
    if unknown:
        raise SystemExit(f"docs/ledger.yaml has rows for what is no recipe: {', '.join(sorted(unknown))}")
    for name in RECIPES:
        entry = row(name, rows)
        lines += [f"### `{name}`", "", " ".join((RECIPES[name].__doc__ or "").split("\n\n")[0].split()), ""]
        lines += [f"- **Promise.** {entry['promise']} {tests(entry['held_by'])}"]
        lines += [f"- **Equation.** {tests(entry['equation'])}"]
        lines += [f"- **Compared.** {entry['compared']}"] if entry.get("compared") else []
        found = ", ".join(f"[{table}](results/{table}.md)" for table, _ in made.get(name, ()))
        lines += [f"- **Tables.** {found or 'None yet.'}", ""]
    return lines


def configurations() -> list[str]:
    """The first lines of every published configuration: which table it repeats, and in what it differs."""
    lines = ["| configuration | what it repeats, and what differs |", "| --- | --- |"]
    for path in sorted((ROOT / "configs" / "benchmarks").glob("*.yaml")):
        text = path.read_text(encoding="utf-8").split("\n# perpetune")[0]
        about = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
        lines.append(f"| `{path.relative_to(ROOT).as_posix()}` | {about} |")
    return lines


def ledger() -> str:
    data = yaml.safe_load(ROWS.read_text(encoding="utf-8"))
    tests([FOR_ALL])
    lines = [START, "## Recipes", "", *recipes(data["recipes"])]
    for title in ("metrics", "models"):
        lines += [f"## {title.capitalize()}", "", "| what | tests |", "| --- | --- |"]
        lines += [f"| {name} | {tests(names)} |" for name, names in data[title].items()] + [""]
    lines += [
        "## Published configurations",
        "",
        "None of them was run at its published size. Tests read every one, build",
    ]
    lines += [f"its stream, and run those of text on tiny models: {tests(data['configurations'])}.", ""]
    lines += [*configurations(), "", "## Tables", "", "| table | command |", "| --- | --- |"]
    made = sorted({entry for found in tables().values() for entry in found})
    lines += [f"| [{table}](results/{table}.md) | `{command}` |" for table, command in made] + [""]
    return "\n".join(lines)


if __name__ == "__main__":
    text = ledger()
    if "--check" in sys.argv:
        now = LEDGER.read_text(encoding="utf-8") if LEDGER.is_file() else ""
        sys.exit(0 if now == text else f"{LEDGER.name} is out of date")
    LEDGER.write_text(text, encoding="utf-8")
    print(f"wrote {LEDGER.relative_to(ROOT)}")
