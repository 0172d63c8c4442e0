"""Commands that make something of a finished run, or a run of what was trained elsewhere: export, serve-config, revert,
tune-scale, adopt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import AsJson, Import, Model, Run, imports
from .output import show


def export(
    run: Run,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    without: Annotated[
        list[str] | None, typer.Option(metavar="TASK", help="Leave this task out; may be given again.")
    ] = None,
    only: Annotated[str | None, typer.Option(metavar="A,B", help="Take these tasks alone.")] = None,
    scale: Annotated[
        list[str] | None, typer.Option(metavar="TASK=0.5", help="Multiply what this task left; may be given again.")
    ] = None,
    model: Model = None,
    import_: Import = None,
    dtype: Annotated[str, typer.Option(help="float32, or bfloat16, to which the sum is rounded once.")] = "float32",
    format: Annotated[
        str, typer.Option(help="merged, a plain transformers model; adapters, LoRA for peft and vLLM.")
    ] = "merged",
    head: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which head to take along; default the first.")
    ] = None,
    no_head: Annotated[bool, typer.Option("--no-head", help="The model alone.")] = False,
    cumulative: Annotated[
        bool, typer.Option("--cumulative", help="Adapters: also one for the model after each task before the last.")
    ] = False,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload the folder to the Hugging Face Hub, privately.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make the repository on the Hub a public one.")] = False,
) -> None:
    """Write a folder that loads without perpetune: a plain transformers model, or LoRA adapters; with a model card.

    `perpetune export runs/sotu --out model/ --without 2026-week-07`

    `merged`, without options: the model as it is, and its head where that is linear (`linear`, `label_text`, `ncm`): a
    ...ForSequenceClassification or ...ForImageClassification with labels where that class pools as the run did, else
    classifier.safetensors beside the model, with a README.md that uses it. With them: the base model and what the
    chosen tasks left on its weights, for recipes with DeltaMerge (`sotu`) and Merge (`lora`, `olora`, ...), to the bit
    as if the others had left nothing; a head was trained with all tasks, and stays in the run.

    `adapters`: a folder for every task where each has its own (`color`, `routed`), which peft loads by name and vLLM
    serves (`perpetune serve-config`); else one LoRA of summed rank for the model after all tasks. `routes.json` says
    which adapter answers which input. A change that is no LoRA of small rank is refused.

    The deltas of DeltaMerge are made from the base, each without the others, unless `sequential` is set. Adapters that
    Merge merged later were trained on top of earlier ones: leaving an earlier one out is not forgetting with proof.
    """
    import shlex
    import sys

    from ..core.errors import ConfigError
    from ..learning.export import Choice
    from ..learning.export import export as write
    from ..learning.learner import Learner

    if head is not None and no_head:
        raise ConfigError("--head names a head to take along, and --no-head leaves it: give one of them")
    imports(import_)
    learner = Learner.open(run, model=model)
    names = None if only is None else [part.strip() for part in only.split(",") if part.strip()]
    factors = dict(_factor(text) for text in scale or ())
    choice: dict[str, Any] = {"only": names, "without": without or (), "scales": factors}
    how: dict[str, Any] = {"dtype": dtype, "head": head or not no_head, "format": format, "cumulative": cumulative}
    command = shlex.join(["perpetune", *sys.argv[1:]])
    folder, told = write(learner.setup, learner.state, out, Choice(**choice, **how, command=command))
    typer.echo(f"{folder}: {_composed(learner, choice)}; {told}")
    if push_to_hub is not None:
        from ..operations.publish import push_to_hub as push

        typer.echo(push(folder, push_to_hub, private=not public))


def serve_config(
    run: Run,
    folder: Annotated[
        Path | None,
        typer.Option(help="What `export --format adapters` wrote; default `adapters` in the run directory."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The base model as the server finds it, if not as the export names it.")
    ] = None,
) -> None:
    """Print the command line with which vLLM serves the adapters of an export.

    `perpetune export runs/r --format adapters --out adapters/ && perpetune serve-config runs/r --folder adapters/`

    A request names the adapter as its model. Which adapter answers which input stands in routes.json.
    """
    from ..operations.serve import as_shell, vllm_command

    typer.echo(as_shell(vllm_command(run, folder, model)))


def _factor(text: str) -> tuple[str, float]:
    from ..core.errors import ConfigError

    task, _, number = text.rpartition("=")
    try:
        return task, float(number)
    except ValueError:
        raise ConfigError(f"--scale takes task=number, not `{text}`") from None


def _composed(learner: Any, choice: dict[str, Any]) -> str:
    """What an exported model is made of, and what can be said of the tasks that were left out."""
    from ..learning.export import choose, ties
    from ..runs.result import Result

    result = Result(learner.path)
    if choice["only"] is None and not choice["without"] and not choice["scales"]:
        return f"the model as it is, after {', '.join(result.tasks) or 'no task'}"
    scales = choose(result.tasks, **choice)
    parts = ", ".join(task if scale == 1 else f"{scale:g} x {task}" for task, scale in scales.items())
    tied = ties(learner.recipe, result)
    if tied is None:
        return f"the base and {parts}; each delta was made from the base alone, without the data of other tasks"
    return f"the base and {parts}; of these deltas {tied}, so leaving a task out is not forgetting it with proof"


def revert(
    run: Run,
    task: Annotated[str, typer.Argument(help="A task that the run has learned.", show_default=False)],
    stream: Annotated[
        str | None, typer.Option(help="Where the other tasks lie, if not where they were when the run was made.")
    ] = None,
    model: Model = None,
    import_: Import = None,
) -> None:
    """Take a task out of what a run has learned, heads included. The run then goes on without it.

    `perpetune revert runs/sotu 2026-week-07`

    Writes a new commit and deletes none. The weights become the base and what the other tasks left on them, for recipes
    with DeltaMerge (`sotu`) and Merge (`lora`, ...); `ncm` and `ridge` are to the bit as if they had never seen its
    samples, `linear` forgets its classes, `ncm_refresh` and `ridge_refresh` gather anew from the training data of the
    other tasks. The test data of the other tasks is read again; the folder of the task itself may be gone.

    The command says whether this is forgetting with proof, or what ties the tasks together. Earlier commits still hold
    what the task left: to give the model away without it, `export`. A task that is taken out is not learned again under
    its name. To look before, `perpetune export --without`; to judge after, `perpetune gate`.
    """
    from ..core.progress import RichProgress
    from ..learning.export import stale, ties
    from ..learning.learner import Learner
    from ..runs.commit import commit_of
    from ..runs.result import Result
    from ..streams import load_again

    imports(import_)
    before = Result(run)
    commit_of(before.commits, task)
    learner = Learner.described(run, model=model, progress=RichProgress())
    tied, shaped = ties(learner.recipe, before), stale(learner.recipe, before, task)
    left = [name for name in before.tasks if name != task]
    after = learner.revert(load_again(before.config["stream"], left, stream, learned=left), task)
    parts = f"the base and {', '.join(left)}" if left else "the base alone"
    reasons = [text for text in (tied and f"of these deltas {tied}", shaped) if text]
    if reasons:
        typer.echo(f"{after.commits[-1].path}: {parts}; this is not forgetting with proof: {'; '.join(reasons)}")
    else:
        typer.echo(f"{after.commits[-1].path}: {parts}; nothing in it was made with the data of {task}")


def tune_scale(
    run: Run,
    values: Annotated[
        str | None, typer.Option(metavar="0.1,0.3,1", help="Scales to try; default eight from 0.1 to 2.")
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            help="ncm (default) or ridge gather statistics anew for every scale; of a language model: language."
        ),
    ] = None,
    stream: Annotated[str | None, typer.Option(help="Where the tasks lie, if not where they were.")] = None,
    model: Model = None,
    import_: Import = None,
    json: AsJson = False,
) -> None:
    """Choose the scale of summed deltas (`sotu`, `task_arithmetic`) on validation data; nothing is learned again.

    `perpetune run --recipe sotu --validation 0.2 --out runs/choose ... && perpetune tune-scale runs/choose`

    The run must have been measured on validation data (--validation), which its deltas were not made with. Prints the
    mean accuracy over all tasks for every scale; learn all data with the best: `recipe: {name: sotu, scale: 0.5}`.
    """
    from ..core.errors import ConfigError
    from ..core.progress import RichProgress
    from ..operations.tune_scale import SCALES, accuracy_by_scale, usual_head
    from ..runs.result import Result
    from ..streams import load_again

    try:
        scales = SCALES if values is None else [float(part) for part in values.split(",")]
    except ValueError:
        raise ConfigError(f"--values takes numbers with commas between them, not `{values}`") from None
    imports(import_)
    result = Result(run)
    data = load_again(result.config["stream"], result.tasks, stream)
    found = accuracy_by_scale(run, data, scales, head=head, model=model, progress=RichProgress())
    best = max(found, key=lambda s: found[s])
    if json:
        show({"head": head or usual_head(data), "best": best, "accuracy": {f"{s:g}": a for s, a in found.items()}})
        return
    for s, accuracy in found.items():
        typer.echo(f"scale {s:<5g} {100 * accuracy:5.1f} %{'   <- best' if s == best else ''}")


def adopt(
    trained: Annotated[
        Path,
        typer.Argument(metavar="ADAPTER", help="Folder of a LoRA adapter, or of a tuned model.", show_default=False),
    ],
    model: Annotated[str, typer.Option(help="Hub id or folder of its base model.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The new run directory.", show_default=False)],
    recipe: Annotated[
        str | None, typer.Option(help="How tasks go on. Default: lora; for a model task_arithmetic with scale 1.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="A sample of what it was trained on, prompts and responses of one task.")
    ] = None,
    task: Annotated[str, typer.Option(help="What it is called in the run.")] = "adopted",
    metric: Annotated[str, typer.Option(help="How generated answers to this data are scored.")] = "exact_match",
    same_base: Annotated[
        bool, typer.Option("--same-base", help="The adapter names its base otherwise, and it is the same.")
    ] = False,
) -> None:
    """Make what was trained elsewhere the first task of a new run, which `run` and pt.Keep go on with.

    `perpetune adopt last_week/ --model Qwen/Qwen2.5-0.5B --recipe olora --data old.jsonl --out runs/weekly`

    A peft LoRA adapter, whose rank, scale and targets the run takes on; or a fine-tuned model, of which the difference
    to its base is the task. With a sample of the data, rules remember its inputs, and it is evaluated. Without, the
    command says what they cannot know.
    """
    from ..core.progress import RichProgress
    from ..learning.learner import Learner
    from .options import value_of_recipe

    given: Any = {"recipe": None if recipe is None else value_of_recipe(recipe), "data": data, "task": task}
    options: Any = {"metric": metric, "same_base": same_base, "progress": RichProgress()}
    learner = Learner.adopt(trained, model, out, **given, **options)
    typer.echo(
        f"{out}: `{task}` is its first task, recipe `{learner.recipe.name}`; go on with `perpetune run --stream TASKS "
        f"--out {out}`, which takes recipe and model from there"
    )
