"""Commands that train: demo, run, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..learning.config import CompareConfig, RunConfig
from .options import configured, whole_numbers
from .output import print_tables, write_json, write_page

JsonFile = Annotated[
    Path | None,
    typer.Option("--json", help="Also write the results as JSON records.", metavar="FILE", rich_help_panel="Output"),
]


def demo(
    out: Annotated[Path, typer.Option(help="Where the runs, results.json and the report go.")] = Path("runs/demo"),
    jobs: Annotated[int, typer.Option(help="Runs at a time, each in its own process.")] = 2,
    seeds: Annotated[str, typer.Option(help="Seeds; each recipe runs with each: 0,1,2.", metavar="A,B")] = "0",
) -> None:
    """See a pre-trained model forget, and not forget: embedded data and model, no download, about a minute."""
    from ..core.progress import RichProgress
    from .demo import run_demo

    run_demo(out, jobs=jobs, seeds=whole_numbers("--seeds", seeds), progress=RichProgress())


@configured(RunConfig, "run")
def run(
    settings: RunConfig,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Only tell what the run will take: time, memory, disk.", rich_help_panel="Output"),
    ] = False,
    json: JsonFile = None,
) -> None:
    """Learn a stream of tasks with one recipe; started again with the same --out, it resumes after the last whole task.

    `perpetune run --model M --stream my_tasks/ --recipe nlora --out runs/nlora`

    Settings come from options, or from a YAML file under the names of the configuration, and options win:
    `perpetune run week.yaml --seed 1`. First see what it will take: `perpetune run week.yaml --plan`.
    """
    from ..core.progress import RichProgress
    from ..learning.gone_data import learned_tasks
    from ..learning.learner import Learner

    learner = Learner.from_config(settings, progress=RichProgress())
    loaded = settings.stream.load(learned_tasks(learner.path))
    if plan:
        from ..learning.task_free import parts, told_segments
        from ..operations.plan import make_plan
        from ..operations.plan_arithmetic import TRIED, on_paper

        if settings.stream.drift is not None:
            fed = settings.stream.drift.feed(loaded)
            loaded = parts(fed, told_segments(fed))
        if (paper := on_paper(learner, loaded)) is not None:
            typer.echo(paper.text())
        if paper is None or paper.parameters <= TRIED:
            typer.echo(make_plan(learner, loaded).text())
        return
    from ..learning.task_free import drift_summary, learn

    result = learn(learner, loaded, settings.stream.drift)
    records = result.records()
    typer.echo("\n".join([result.summary(), *drift_summary(result)]))
    write_json(json, records)
    typer.echo(f"report: {write_page([result], records, result.path / 'report' / 'index.html', 'run')}")


@configured(CompareConfig, "compare")
def compare(settings: CompareConfig, json: JsonFile = None) -> None:
    """Several recipes and seeds on the same data and step budget; prints mean, spread and forgetting.

    `perpetune compare --model M --stream my_tasks/ --recipes olora,nlora --seeds 0,1,2 --out runs/compare`

    Settings come from options, or from a YAML file under the names of the configuration, and options win. Controls run
    beside the recipes, so that a figure says something: what training without protection forgets (sequential), what
    training on all data at once reaches (joint), and what the model knew before (frozen_ridge).
    """
    from ..core.progress import RichProgress
    from ..metrics.records import write_records
    from ..operations.compare import compare as run_comparison

    folder = Path(settings.out or "runs/compare")
    found = settings.stream.load()
    records, failed = run_comparison(settings, folder, found.modality, RichProgress(), found.captions)
    write_records(folder / "results.json", records)
    write_json(json, records)
    print_tables(records)
    if records:
        typer.echo(f"report: {write_page([], records, folder / 'report' / 'index.html', 'compare')}")
    if failed:
        for label, reason in failed:
            typer.echo(f"failed: {label}: {reason}", err=True)
        raise typer.Exit(1)
