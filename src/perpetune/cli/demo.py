"""The demo: a small pre-trained model forgets, and does not forget; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from ..core.progress import Progress
from ..learning.config import CompareConfig, StreamConfig
from ..metrics.records import ResultRecord, write_records
from ..operations.compare import compare
from .output import print_failed, print_tables, write_page

RECIPES: list[str | dict[str, Any]] = [
    {"name": "sequential_lora", "rank": 4, "target": "all-linear"},
    {"name": "lora", "rank": 4, "target": "all-linear"},
    {"name": "olora", "rank": 4, "target": "all-linear"},
    {"name": "nlora", "rank": 4, "target": "all-linear", "strength": 1e-3},
    {"name": "default", "rank": 4, "target": "all-linear", "features": 256},
    {"name": "replay", "rank": 4, "target": "all-linear"},
    {"name": "joint", "rank": 4, "target": "all-linear"},
    "sequential",
    {"name": "frozen_ridge", "features": 256},
    {  # reads pictures as `default` does
        "name": "frozen_views",
        "tuner": {"type": "Frozen", "views": 8},
        "heads": [{"type": "ridge", "features": 256}],
    },
    {"name": "pixels_ridge", "features": 256},
]


def run_demo(out: Path, *, jobs: int, seeds: list[int], progress: Progress) -> list[ResultRecord]:
    """Five tasks of two transposed digits each, at random places in clutter, learned one after another by a micro ViT
    that was pre-trained, on the spot, on upright and turned digits in clutter. Writes `results.json` and
    `report/index.html` under `out`."""
    from .demo_model import demo_vit

    typer.echo(
        "A micro ViT that finds upright digits in clutter learns transposed ones: five tasks of two, one by one."
    )
    config = CompareConfig(
        model=str(demo_vit()),
        stream=StreamConfig(source="digits-clutter"),
        recipes=RECIPES,
        seeds=seeds,
        heads=["linear", {"type": "ridge", "features": 256}],
        jobs=jobs,
        controls=False,  # they are in the list, with the demo's rank
        training={"num_train_epochs": 4, "per_device_train_batch_size": 16, "learning_rate": 3e-3},
    )
    records, failed = compare(config, out, "image", progress)
    write_records(out / "results.json", records)
    print_tables(records)
    print_failed(failed)
    if records:
        page = write_page([], records, out / "report" / "index.html", "compare")
        typer.echo(f"results: {out / 'results.json'}\nreport:  {page}")
    if failed:
        raise typer.Exit(1)
    return records
