"""Turns the results.json of a comparison into a page of docs/results and its figures as JSON, more than the page shows.

python docs/make_results.py runs/text/results.json --name text --title "Five text tasks" --command "perpetune ..."
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from perpetune.metrics.records import aggregate, markdown_table, read_records

RESULTS = Path(__file__).resolve().parent / "results"
METRICS = ("final_accuracy", "forgetting", "plasticity", "average_incremental_accuracy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, nargs="+", help="results.json of one comparison or several")
    parser.add_argument("--name", required=True, help="docs/results/NAME.md and NAME.json are written")
    parser.add_argument("--title", required=True)
    parser.add_argument("--command", required=True, help="the command, or the commands, that made the records")
    parser.add_argument("--text", type=Path, help="a file with what the figures say, put above the tables")
    options = parser.parse_args()
    records = [record for path in options.records for record in read_records(path)]
    rows = aggregate(records)
    lines = [f"# {options.title}", "", "```", options.command, "```", ""]
    if options.text:
        lines += [options.text.read_text().strip(), ""]
    for scenario in dict.fromkeys(r.scenario for r in records):
        lines += [f"## {scenario}-incremental", ""]
        for metric in METRICS[:1] + METRICS[2:3]:
            lines += [f"### {metric.replace('_', ' ')}", "", markdown_table(rows, scenario, metric), ""]
    names = ("recipe", "scenario", "head", "stream", "seeds", *METRICS)
    kept = [{name: row[name] for name in names} for row in rows]
    (RESULTS / f"{options.name}.md").write_text("\n".join(lines))
    data = {"command": options.command, "rows": kept}
    (RESULTS / f"{options.name}.json").write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
