"""A whole `perpetune run --recipe lora` beside a plain loop of transformers and peft on the same batches.

    python -m benchmarks.whole_run --model PATH/TO/model.gguf --out docs/results/whole_run.md

A GGUF file is written once as a plain folder. Both sides load the same model and files, train a fresh LoRA for each
task with the stock Trainer, on the same examples in the same order, merge it, and write the adapter; each in a process
of its own, from its start to its end, imports included. They take turns, and the ratio is that of each pair, so that
load cancels; `CPU` is the same ratio of the seconds that their threads computed. Without evaluation a test split has
one row, which perpetune must have; with it, both sides predict the tasks so far before and after every task. The losses
of the first and the last step say whether the batches were the same. A step is the time within `Trainer.train`, divided
by the steps.

The language model is also trained by `SFTTrainer` and peft alone (`sft`), with which TRL's share in a step is compared.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

from .command import Benchmark, Option, WrongOption, bundled_model, figure, table, threads
from .plain_peft import CLASSES, plain_peft

RATE = 1e-3
END = "<|im_end|>"  # of a turn, where --end does not say
BATCH = {"encoder": 32, "language": 8}  # rows of a step
NAMES = {
    "encoder": "MiniLM", "language": "a language model", "peft": "`Trainer` + peft", "sft": "`SFTTrainer` + peft"
}  # fmt: skip


# ---- the stream ----


def make_stream(folder: Path, kind: str, tasks: int, train: int, test: int, words: int) -> Path:
    """Tasks of random words: with classes for an encoder, conversations with a short answer for a language model."""
    draw = random.Random(0)
    known = ["".join(draw.choices("aeiouklmnprst", k=draw.randint(3, 8))) for _ in range(2000)]
    for t in range(tasks):
        place = folder / f"task-{t}"
        place.mkdir(parents=True)
        own = [draw.sample(known, 30) for _ in range(CLASSES)]
        for split, count in (("train", train), ("test", test)):
            lines = []
            for i in range(count):
                text = " ".join(draw.choices(own[i % CLASSES], k=words))
                if kind == "encoder":
                    lines.append({"text": text, "label": f"class {t} {i % CLASSES}"})
                    continue
                answer = f"It is kind {i % CLASSES} of shelf {t}, ask for {own[i % CLASSES][0]}."
                turns = [("user", f"{text}\nWhich kind is it?"), ("assistant", answer)]
                lines.append({"messages": [{"role": role, "content": said} for role, said in turns]})
            (place / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return folder


# ---- one side, in a process of its own ----


@contextmanager
def timed_training() -> Iterator[dict[str, Any]]:
    """What `Trainer.train` takes within: seconds, seconds of CPU, steps, and the first and last loss of each task."""
    from transformers import Trainer

    found: dict[str, Any] = {"train": 0.0, "train_cpu": 0.0, "steps": 0, "losses": []}
    train = Trainer.train

    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        began, cpu = perf_counter(), process_time()
        result = train(self, *args, **kwargs)
        found["train"] += perf_counter() - began
        found["train_cpu"] += process_time() - cpu
        found["steps"] += self.state.global_step
        told = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
        found["losses"] += [told[0], told[-1]]
        return result

    Trainer.train = timed  # type: ignore[method-assign]
    yield found


def one(side: str, settings: dict[str, Any]) -> dict[str, Any]:
    with timed_training() as found:
        {"perpetune": perpetune, "peft": plain_peft, "sft": plain_peft}[side](settings, side)
    return {**found, "cpu": process_time()}


def perpetune(settings: dict[str, Any], side: str) -> None:
    from perpetune.cli import main

    scored = "exact_match" if settings["evaluated"] else "likelihood"  # for which nothing is generated
    own = ["--metric", scored] if settings["kind"] == "language" else ["--scenario", "class"]
    for name, value in settings["training"].items():
        own += ["--set", f"{name}={value}"]
    own += ["--evaluate-every", "1" if settings["evaluated"] else "0", "--dtype", "float32"]
    given = ["--model", settings["model"], "--stream", settings["stream"], "--recipe", "lora", "--device", "cpu"]
    try:
        main(["run", *given, *own, "--out", settings["out"]])
    except SystemExit as stopped:
        if stopped.code:
            raise


# ---- all sides ----


def measured(side: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What one side says of itself, in a new process, and its seconds from start to end."""
    with tempfile.TemporaryDirectory() as out:
        own = json.dumps({**settings, "out": f"{out}/run"})
        began = perf_counter()
        command = [sys.executable, "-m", "benchmarks.whole_run", "--one", side, own]
        threads = {"OMP_NUM_THREADS": str(settings["threads"])} if settings["threads"] else {}
        found = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **threads})
        if found.returncode:
            raise SystemExit(f"{side}: {found.stderr}")
        return {**json.loads(found.stdout.splitlines()[-1]), "wall": perf_counter() - began}


def compared(pairs: list[dict[str, dict[str, Any]]], other: str, evaluated: int) -> dict[str, Any]:
    """Medians over the rounds, and over their ratios, of perpetune and another side."""

    def ratio(of: Any) -> float:
        return statistics.median(of(pair["perpetune"]) / of(pair[other]) for pair in pairs)

    def middle(side: str, key: str) -> float:
        return statistics.median(pair[side][key] for pair in pairs)

    whole, losses = ratio(lambda x: x["wall"]), [pairs[0][side]["losses"] for side in ("perpetune", other)]
    return {
        "beside": other,
        "evaluated": evaluated,
        "rounds": len(pairs),
        "steps": pairs[0][other]["steps"],
        "perpetune": middle("perpetune", "wall"),
        "other": middle(other, "wall"),
        "ratio": whole,
        "throughput": 1 / whole,
        "cpu": ratio(lambda x: x["cpu"]),
        "step": ratio(lambda x: x["train"] / x["steps"]),
        "step_cpu": ratio(lambda x: x["train_cpu"] / x["steps"]),
        "loss_apart": max(abs(a - b) for a, b in zip(*losses, strict=True)),
    }


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    if options.one:
        print(json.dumps(one(options.one[0], json.loads(options.one[1]))))
        raise SystemExit
    if "language" in options.kinds and not options.model:
        raise WrongOption("a language model needs --model: a GGUF file, or a folder with a chat template")
    with tempfile.TemporaryDirectory() as folder:
        if "language" in options.kinds and Path(options.model).suffix == ".gguf":
            write_folder(options.model, folder)
            options.model = folder
        records = [record for kind in options.kinds for record in measure_kind(kind, options)]
    if options.out:
        Path(options.out).write_text(page(records, options), encoding="utf-8")
    return records


def write_folder(gguf: str, folder: str) -> None:
    """The model of a GGUF file as a plain folder: transformers refuses to train what it loads from such a file."""
    from perpetune.models.language_loading import load_language_model

    model = load_language_model(gguf)
    model.model.save_pretrained(folder)
    model.save_processors(folder)


def measure_kind(kind: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    batch = BATCH[kind]
    training = {"num_train_epochs": 1, "per_device_train_batch_size": batch, "learning_rate": RATE}
    training |= {"per_device_eval_batch_size": 2 * batch, "weight_decay": 0.0, "logging_steps": 1}
    sides = ["perpetune", "peft", *(["sft"] if kind == "language" else [])]
    records, shuffle = [], random.Random(0)
    for evaluated in (each == "with" for each in options.evaluation):
        with tempfile.TemporaryDirectory() as root:
            rows = (options.steps * batch, options.test if evaluated else 1)
            settings = {
                "kind": kind,
                "model": options.model if kind == "language" else bundled_model(),
                "stream": str(make_stream(Path(root) / "stream", kind, options.tasks, *rows, options.words)),
                "training": training,
                "evaluated": 2 * batch if evaluated else 0,
                "end": options.end,
                "threads": options.threads,
            }
            asked = sides[:2] if evaluated else sides
            pairs = []
            for _ in range(options.rounds):
                pairs.append({side: measured(side, settings) for side in shuffle.sample(asked, len(asked))})
                print(json.dumps(pairs[-1]), file=sys.stderr, flush=True)
            found = [compared(pairs, other, rows[1] if evaluated else 0) for other in asked[1:]]
            records += [{"kind": kind, "batch": batch, **record} for record in found]
    return records


def page(records: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """The records as a page of the documentation."""
    rounds = records[0]["rounds"]
    lines = [
        "# A whole run, beside plain transformers and peft",
        "",
        "```",
        "python -m benchmarks.whole_run --model PATH/TO/model.gguf --out docs/results/whole_run.md",
        "```",
        "",
        "`perpetune run --recipe lora` and a loop of `Trainer` and peft that trains, merges and saves a LoRA for each",
        f"task: {options.tasks} tasks of {options.steps} steps, the same model, files and batches, each side in a",
        f"process of its own, imports included, in turns. Medians of {rounds} rounds; a ratio is that of",
        "a round, perpetune's seconds by the other's. *Throughput* is 1 by the ratio of whole runs; *CPU* is the ratio",
        "of the seconds that threads computed, which others on the machine disturb less. A step is `Trainer.train` by",
        f"its steps. Load average of the machine at the end: {os.getloadavg()[0]:.0f}.",
        "",
        "| model | batch | beside | test rows a task | perpetune (s) | other (s) | ratio | throughput | CPU | a step | "
        "its CPU | losses apart |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for record in records:
        cells = [NAMES[record["kind"]], record["batch"], NAMES[record["beside"]], record["evaluated"] or "none"]
        lines.append("| " + " | ".join([*map(str, cells), *(cell(record) for cell in FIGURES.values())]) + " |")
    return "\n".join(lines) + "\n"


OPTIONS = (
    Option("--one", None, argparse.SUPPRESS, nargs=2),
    Option("--kinds", ("encoder", "language"), "what is trained", nargs="+", choices=tuple(BATCH)),
    Option("--model", None, "the language model: a GGUF file, or a folder with a chat template"),
    Option("--end", END, "the token with which its chat template ends a turn"),
    Option("--tasks", 2, "tasks", least=1),
    Option("--steps", 40, "steps of a task", least=2),
    Option("--words", 40, "words of a text", least=4),
    Option("--test", 64, "test rows of a task, where it is evaluated", least=2),
    Option("--evaluation", ("without", "with"), "what is measured", nargs="+", choices=("without", "with")),
    Option("--rounds", 3, "how often the sides take turns", least=1),
    Option("--out", None, "a page to write"),
    threads(),
)
FIGURES = {
    "perpetune s": figure("perpetune", ".1f"),
    "other s": figure("other", ".1f"),
    "ratio": figure("ratio", ".3f"),
    "throughput": figure("throughput", ".3f"),
    "CPU": figure("cpu", ".3f"),
    "a step": figure("step", ".3f"),
    "its CPU": figure("step_cpu", ".3f"),
    "losses apart": figure("loss_apart", ".1e"),
}
COLUMNS = {
    "of": figure("kind", "s"),
    "beside": figure("beside", "s"),
    "test rows": figure("evaluated", "d"),
    **FIGURES,
}
main = Benchmark("whole_run", __doc__, OPTIONS, measure, table(COLUMNS)).main


if __name__ == "__main__":
    main()
