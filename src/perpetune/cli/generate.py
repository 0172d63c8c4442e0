"""The command that lets a language model answer: generate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Import, Model, Run, imports


def generate(
    run: Run,
    prompt: Annotated[str | None, typer.Argument(help="One prompt; its answer is shown as it comes.")] = None,
    input_: Annotated[
        Path | None,
        typer.Option(
            "--input", metavar="FILE", help="Prompts: .txt, one a line; .jsonl with prompt or messages; CSV, Parquet."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The rows of --input with a column `generated`: .jsonl, .csv or .parquet; else stdout.",
        ),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Whose adapter answers, where each task has one; by default the router's choice.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens of an answer at most; default 256.")] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; above it tokens are drawn.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this probability together.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    batch_size: Annotated[
        int | None, typer.Option(help="Prompts at a time; by default as many as in evaluation.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda …; by default an accelerator.")] = None,
    model: Model = None,
    import_: Import = None,
) -> None:
    """Let the language model of a run answer prompts.

    `perpetune generate runs/weekly "How do I send a parcel back?"`

    `perpetune generate runs/weekly --input questions.jsonl --output answers.jsonl`

    Where the run learned conversations, a prompt is a user's turn. Rows keep their other columns; of `messages` the
    assistant's last turn is left out, and answered anew. Where every task has an adapter, each prompt goes to the one
    that the router chooses, or to that of --task.
    """
    from ..core.errors import ConfigError
    from ..learning.learner import Learner
    from ..streams.predict_files import asked, check_output, generated_lines, read_prompts, write_generated

    if (prompt is None) == (input_ is None):
        raise ConfigError("give one prompt, or a file of prompts (--input)")
    if output is not None and input_ is None:
        raise ConfigError("--output is for the answers to --input; that to one prompt is shown")
    if output is not None:
        check_output(output)
    rows = [] if input_ is None else read_prompts(input_)
    imports(import_)
    learner = Learner.open(run, model=model, device=device)
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    if prompt is not None:
        learner.generate([prompt], task=task, streamer=_streamer(learner), **how)
        return
    answers = learner.generate(list(map(asked, rows)), task=task, batch_size=batch_size, **how)
    if output is None:
        typer.echo(generated_lines(rows, answers), nl=False)
        return
    write_generated(output, rows, answers)
    typer.echo(f"{output}: {len(answers)} answers")


def _streamer(learner: Any) -> Any:
    from transformers import TextStreamer

    processor = learner.backbone.processor
    return TextStreamer(getattr(processor, "tokenizer", processor), skip_prompt=True, skip_special_tokens=True)
