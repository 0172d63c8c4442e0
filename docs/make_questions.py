"""Fills the tables of docs/results/questions.md from the records of `benchmarks.questions` and `benchmarks.zero_shot`.

python -m docs.make_questions collisions=runs/questions/collisions.json [TABLE=FILE, again for more records of a table]

The page says which columns a table shows, in the comment before it: <!-- table NAME: final (ridge) | f (ridge) -->
Records are kept in docs/results/questions.records.json; without arguments the page is made anew from them.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.questions import table

RESULTS = Path(__file__).resolve().parent / "results"
PAGE, RECORDS = RESULTS / "questions.md", RESULTS / "questions.records.json"
PLACE = re.compile(r"(<!-- table (?P<name>[\w-]+): (?P<columns>[^\n]+?) -->\n).*?(\n<!-- /table -->)", re.DOTALL)


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in row.items()}


def filled(page: str, records: dict[str, list[dict[str, Any]]]) -> str:
    """The page with every table that there are records of; the others stay as they are."""

    def fill(place: re.Match[str]) -> str:
        rows = records.get(place["name"])
        if rows is None:
            return place[0]
        columns = [column.strip() for column in place["columns"].split(" | ")]
        chosen = [{key: row.get(key) for key in ("recipe", "seed", *columns)} for row in rows]
        return f"{place[1]}\n{table(chosen)}\n{place[4]}"

    return PLACE.sub(fill, page)


def main(arguments: Sequence[str]) -> None:
    records = json.loads(RECORDS.read_text(encoding="utf-8")) if RECORDS.exists() else {}
    new: dict[str, list[dict[str, Any]]] = {}
    for argument in arguments:
        name, _, file = argument.partition("=")
        rows = json.loads(Path(file).read_text(encoding="utf-8"))
        new.setdefault(name, []).extend(rounded(row) for row in rows)
    records |= new
    lines = {name: ",\n".join(f"  {json.dumps(row)}" for row in rows) for name, rows in records.items()}
    text = ",\n".join(f' "{name}": [\n{rows}\n ]' for name, rows in lines.items())
    RECORDS.write_text(f"{{\n{text}\n}}\n", encoding="utf-8")
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), records), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
