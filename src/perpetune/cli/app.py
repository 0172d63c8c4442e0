"""The command line: parses, calls, prints. Heavy imports only inside the commands that need them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import finished as cli_finished

if TYPE_CHECKING:
    from ..metrics.accuracy import AccuracyMatrix
    from ..runs.result import Result

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="""Fine-tune a pre-trained model on one task after another, and keep what it knew.

Start with `perpetune demo`. Then give it your own model and a folder of tasks:

`perpetune run --model sentence-transformers/all-MiniLM-L6-v2 --stream my_tasks/ --recipe olora --out runs/olora`
""",
)

ConfigFile = Annotated[Path | None, typer.Argument(help="YAML file with the settings below; options win over it.")]
Model = Annotated[str | None, typer.Option(help="Hub id or folder of an encoder, or of a language model for prompts.")]
StreamOption = Annotated[
    str | None,
    typer.Option(
        "--stream",
        help="Folder of tasks, a built-in (digits, digits-transposed, digits-drift), a dataset, or a published "
        "benchmark (`perpetune list benchmarks`).",
    ),
]
Data = Annotated[str | None, typer.Option(help="Folder with the files of a published benchmark.")]
Drift = Annotated[
    int | None,
    typer.Option(
        help="Feed the tasks' examples in order, as this many segments with repeats, and tell no boundaries: new tasks "
        "are noticed, known ones reopened (recipes color, routed). More in the configuration, stream: {drift: {…}}."
    ),
]
Told = Annotated[bool | None, typer.Option("--told", help="With --drift: tell the boundaries after all, to compare.")]
Tasks = Annotated[str | None, typer.Option(help="Tasks to take, in this order: agnews,amazon,yelp.")]
Scenario = Annotated[str | None, typer.Option(help="class, domain or task; default from the labels.")]
SplitBy = Annotated[str | None, typer.Option(help="Divide one labelled dataset: by `class`, or by a column.")]
ClassesPerTask = Annotated[int | None, typer.Option(help="With --split-by class; of a benchmark, instead of its own.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, mps; default an accelerator where there is one.")]
TrainLimit = Annotated[int | None, typer.Option(help="At most this many training examples a task (stratified).")]
TestLimit = Annotated[int | None, typer.Option(help="At most this many test examples a task (stratified).")]
Heads = Annotated[
    str | None,
    typer.Option(help="Heads to read (`perpetune list heads`): linear, ncm, ridge, contrastive; the first trains."),
]
Out = Annotated[Path | None, typer.Option(help="Run directory; started again with the same one, the run resumes.")]
Epochs = Annotated[float | None, typer.Option(help="Epochs a task.")]
BatchSize = Annotated[int | None, typer.Option(help="Training examples a step.")]
LearningRate = Annotated[float | None, typer.Option(help="Learning rate of the tuner; each recipe has its default.")]
Training = Annotated[
    list[str] | None, typer.Option("--set", help="Any transformers.TrainingArguments setting: --set warmup_steps=10.")
]
MaxLength = Annotated[int | None, typer.Option(help="Longest text, in tokens.")]
EvaluateEvery = Annotated[
    int | None,
    typer.Option(help="Evaluate all earlier tasks after every so many tasks only, and after the last; 0: then alone."),
]
Pooling = Annotated[str | None, typer.Option(help="mean, cls, last or pooler; default from the architecture.")]
Validation = Annotated[
    float | None,
    typer.Option("--validation", help="Measure on this share of the training data instead of the test data."),
]
Pose = Annotated[
    str | None, typer.Option(help="For language models: texts as instructions; `instruction` or `published`.")
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the results as JSON records.")]


def _training(epochs: float | None, batch: int | None, rate: float | None, extra: list[str] | None) -> dict[str, Any]:
    import yaml

    from ..core.errors import ConfigError

    named = {"num_train_epochs": epochs, "per_device_train_batch_size": batch, "learning_rate": rate}
    training = {k: v for k, v in named.items() if v is not None}
    for item in extra or ():
        key, separator, value = item.partition("=")
        if not separator:
            raise ConfigError(f"--set takes name=value, not `{item}`")
        training[key.strip()] = yaml.safe_load(value)
    return training


def _settings(config: Path | None, kind: Any, given: dict[str, Any]) -> Any:
    """The configuration file and the options of a command (its `locals()`) as one checked configuration."""
    from ..learning.config import load_config

    stream = {
        "source": given["stream"],
        "data": given["data"],
        "tasks": _names(given["tasks"]),
        "scenario": given["scenario"],
        "split_by": given["split_by"],
        "classes_per_task": given["classes_per_task"],
        "train_limit": given["train_limit"],
        "test_limit": given["test_limit"],
        "validation_share": given["validation"],
        "drift": _given(segments=given["drift"], told=given["told"]),
        "pose": given["pose"],
    }
    plain = ("model", "recipe", "seed", "controls", "jobs", "max_length", "pooling", "evaluate_every", "device")
    overrides = {
        **{name: given[name] for name in plain if name in given},
        "imports": given["import_"],
        "heads": _names(given["heads"]),
        "out": str(given["out"]) if given["out"] else None,
        "recipes": _names(given.get("recipes")),
        "seeds": _seeds(given["seeds"]) if given.get("seeds") else None,
        "stream": {k: v for k, v in stream.items() if v is not None},
        "training": _training(given["epochs"], given["batch_size"], given["learning_rate"], given["training"]),
    }
    return load_config(config, kind, overrides)


def _given(**options: Any) -> dict[str, Any] | None:
    return {name: value for name, value in options.items() if value is not None} or None


def _names(text: str | None) -> list[str] | None:
    return [part.strip() for part in text.split(",") if part.strip()] if text else None


def _report(results: list[Result], records: list[Any], path: Path, kind: str) -> Path:
    from ..report import write_report
    from ..report.collect import report_data

    return write_report(path, report_data(results, records, kind))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the runs, results.json and the report go.")] = Path("runs/demo"),
    jobs: Annotated[int, typer.Option(help="Runs at a time.")] = 2,
    seeds: Annotated[str, typer.Option(help="Seeds, 0,1,2.")] = "0",
) -> None:
    """See a pre-trained model forget, and not forget: embedded data and model, no download, about a minute."""
    from ..core.progress import RichProgress
    from .demo import run_demo

    run_demo(out, jobs=jobs, seeds=_seeds(seeds), progress=RichProgress())


@app.command()
def run(
    config: ConfigFile = None,
    model: Model = None,
    stream: StreamOption = None,
    data: Data = None,
    recipe: Annotated[str | None, typer.Option(help="A recipe; `perpetune list recipes` shows all.")] = None,
    heads: Heads = None,
    out: Out = None,
    tasks: Tasks = None,
    scenario: Scenario = None,
    split_by: SplitBy = None,
    classes_per_task: ClassesPerTask = None,
    train_limit: TrainLimit = None,
    test_limit: TestLimit = None,
    validation: Validation = None,
    drift: Drift = None,
    told: Told = None,
    pose: Pose = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    learning_rate: LearningRate = None,
    training: Training = None,
    max_length: MaxLength = None,
    pooling: Pooling = None,
    evaluate_every: EvaluateEvery = None,
    device: Device = None,
    import_: cli_finished.Import = None,
    seed: Annotated[int | None, typer.Option(help="Decides everything random.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only say what the run will take: time, memory, disk.")] = False,
    json: JsonFile = None,
) -> None:
    """Learn a stream of tasks with one recipe; started again with the same --out, it resumes after the last whole task.

    `perpetune run --model M --stream tasks/ --recipe nlora --out runs/nlora`
    """
    from ..learning.config import RunConfig

    settings = _settings(config, RunConfig, locals())
    from ..core.progress import RichProgress
    from ..learning.learner import Learner

    loaded = settings.stream.load()
    learner = Learner.from_config(settings, progress=RichProgress())
    if plan:
        from ..learning.task_free import parts, told_segments
        from ..operations.plan import make_plan

        if settings.stream.drift is not None:
            fed = settings.stream.drift.feed(loaded)
            loaded = parts(fed, told_segments(fed))
        typer.echo(make_plan(learner, loaded).text())
        return
    from ..learning.task_free import drift_summary, learn

    result = learn(learner, loaded, settings.stream.drift)
    records = result.records()
    typer.echo("\n".join([result.summary(), *drift_summary(result)]))
    _write_json(json, records)
    typer.echo(f"report: {_report([result], records, result.path / 'report' / 'index.html', 'run')}")


@app.command()
def compare(
    config: ConfigFile = None,
    recipes: Annotated[str | None, typer.Option(help="Recipes: olora,nlora,lora; the controls are added.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds: 0,1,2.")] = None,
    controls: Annotated[
        bool | None,
        typer.Option("--controls/--no-controls", help="Add sequential, joint, frozen_ridge and no network."),
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="Runs at a time, each in its own process.")] = None,
    model: Model = None,
    stream: StreamOption = None,
    data: Data = None,
    heads: Heads = None,
    out: Out = None,
    tasks: Tasks = None,
    scenario: Scenario = None,
    split_by: SplitBy = None,
    classes_per_task: ClassesPerTask = None,
    train_limit: TrainLimit = None,
    test_limit: TestLimit = None,
    validation: Validation = None,
    drift: Drift = None,
    told: Told = None,
    pose: Pose = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    learning_rate: LearningRate = None,
    training: Training = None,
    max_length: MaxLength = None,
    pooling: Pooling = None,
    evaluate_every: EvaluateEvery = None,
    device: Device = None,
    import_: cli_finished.Import = None,
    json: JsonFile = None,
) -> None:
    """Several recipes and seeds on the same data and step budget; prints mean, spread and forgetting.

    `perpetune compare --model M --stream tasks/ --recipes olora,nlora --seeds 0,1,2 --out runs/compare`
    """
    from ..learning.config import CompareConfig

    settings = _settings(config, CompareConfig, locals())
    from ..core.progress import RichProgress
    from ..metrics.records import write_records
    from ..operations.compare import compare as run_comparison

    folder = Path(settings.out or "runs/compare")
    found = settings.stream.load()
    records, failed = run_comparison(settings, folder, found.modality, RichProgress(), found.captions)
    write_records(folder / "results.json", records)
    _write_json(json, records)
    print_tables(records)
    if records:
        typer.echo(f"report: {_report([], records, folder / 'report' / 'index.html', 'compare')}")
    if failed:
        for label, reason in failed:
            typer.echo(f"failed: {label}: {reason}", err=True)
        raise typer.Exit(1)


@app.command()
def report(
    path: Annotated[Path, typer.Argument(help="A run directory, or a folder with results.json of a comparison.")],
    convention: Annotated[
        str | None,
        typer.Option(help="Print the figures as other code computes them: pilot, mammoth, avalanche, gem, trace."),
    ] = None,
    geometry: Annotated[
        float | None,
        typer.Option(
            metavar="TOLERANCE", help="Print how the LoRA updates of the tasks lie to each other (collisions above it)."
        ),
    ] = None,
) -> None:
    """Write the report of a run or a comparison again, from what its directory holds."""
    from ..core.errors import ConfigError
    from ..learning.task_free import drift_summary
    from ..metrics.records import read_records
    from ..operations.compare import found_records
    from ..runs.result import Result

    records = read_records(path / "results.json") if (path / "results.json").is_file() else found_records(path)
    if records:
        if geometry is not None:
            raise ConfigError(f"{path} is a comparison: --geometry is for one of its runs ({records[0].run})")
        print_tables(records)
        if convention:
            for record in records:
                label = f"{record.recipe} seed {record.seed} · head {record.head} · {record.scenario}"
                typer.echo(_in_convention(label, record.accuracy_matrix(), convention))
        typer.echo(f"report: {_report([], records, path / 'report' / 'index.html', 'compare')}")
        return
    result = Result(path)
    typer.echo("\n".join([result.summary(), *drift_summary(result)]))
    if geometry is not None:
        from ..metrics.geometry import geometry_lines

        typer.echo("\n".join(geometry_lines(result.geometry(geometry), geometry)))
    if convention:
        for head, kind in result.readings:
            typer.echo(_in_convention(f"head {head} · {kind}", result.matrix(head, kind), convention))
    typer.echo(f"report: {_report([result], result.records(), path / 'report' / 'index.html', 'run')}")


@app.command("list")
def list_(
    what: Annotated[
        str, typer.Argument(help="recipes, tuners, rules, consolidations, routers, heads, streams or benchmarks.")
    ] = "recipes",
) -> None:
    """What can be chosen from, each with what it does and where it comes from."""
    from rich.console import Console
    from rich.table import Table

    from .catalogue import catalogue

    table = Table("name", "what it is", "settings", show_lines=False, box=None)
    for name, summary, settings in catalogue(what):
        table.add_row(name, summary, settings)
    Console().print(table)


@app.command()
def log(path: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """The tasks that a run has learned, newest last: when, how long, how well right after, how well now."""
    from rich.console import Console

    from ..runs.result import Result
    from .catalogue import log_table

    Console().print(log_table(Result(path)))


for command in cli_finished.COMMANDS:
    app.command()(command)


def print_tables(records: list[Any]) -> None:
    """One table for each scenario: recipes down, heads across, final accuracy with spread and forgetting."""
    from rich.console import Console

    from ..metrics.records import aggregate, table

    aggregated = aggregate(records)
    for kind in dict.fromkeys(r.scenario for r in records):
        Console().print(table(aggregated, kind))


def _in_convention(label: str, matrix: AccuracyMatrix, convention: str) -> str:
    from ..metrics.conventions import in_convention

    figures = in_convention(matrix, convention).items()
    told = ", ".join(f"{name} {'undefined' if value is None else f'{value:.4f}'}" for name, value in figures)
    return f"{convention} · {label}: {told}"


def _write_json(path: Path | None, records: list[Any]) -> None:
    from ..metrics.records import write_records

    if path is not None:
        write_records(path, records)


def _seeds(text: str) -> list[int]:
    from ..core.errors import ConfigError

    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds takes whole numbers, 0,1,2, not `{text}`") from None


def main() -> None:
    """Run the command line; an error that a user can mend is one line on stderr and exit code 2."""
    from ..core.errors import PerpetuneError

    try:
        app()
    except PerpetuneError as error:
        typer.echo(f"perpetune: {error}", err=True)
        sys.exit(2)
