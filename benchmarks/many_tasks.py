"""What a task costs after a thousand others: time, memory, disk, and opening the run, against task 10.

    python -m benchmarks.many_tasks --tasks 1000 --recipes lora,olora,pegp_lora_fresh,sotu,routed,ridge

A micro BERT with random weights (hidden size 32, two layers), tasks of two classes with 24 training and 6 test rows,
two optimizer steps a task, `--evaluate-every 0`. Each recipe has a process of its own. The figures of task 10 are the
median of tasks 6 to 15, those of the last task the median of the last ten. Opening is `Learner.open` on a copy of the
run with so many commits, the best of three. `calls` counts Python and C function calls while a task is learned, which
do not depend on how busy the machine is. `memory` is held after a task, without files that are mapped.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

from .command import Benchmark, Option

RECIPES = ("lora", "olora", "pegp_lora_fresh", "sotu", "routed", "ridge")
FIRST = 10  # the task that the last one is compared with
NAMES = {"ridge": "frozen_ridge"}
TRAINING = {"max_steps": 2, "per_device_train_batch_size": 12}
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def make_model(folder: Path) -> Path:
    """A BERT of 32 features with random weights, and a tokenizer of single letters."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {piece: i for i, piece in enumerate([*special, *LETTERS, *("##" + c for c in LETTERS)])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 64, "max_position_embeddings": 32, "initializer_range": 0.2}
    BertModel(BertConfig(vocab_size=len(vocabulary), **sizes)).save_pretrained(folder)
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **names).save_pretrained(folder)
    return folder


def make_stream(folder: Path, tasks: int) -> Path:
    """Texts of words that each class draws from its own few; a task has two classes."""
    generator = random.Random(0)
    for t in range(tasks):
        task = folder / f"task-{t:04d}"
        task.mkdir(parents=True)
        words = {c: ["".join(generator.choices(LETTERS, k=4)) for _ in range(3)] for c in "ab"}
        for split, count in (("train", 24), ("test", 6)):
            rows = [
                {"text": " ".join(generator.choices(words["ab"[i % 2]], k=3)), "label": f"{t} {'ab'[i % 2]}"}
                for i in range(count)
            ]
            (task / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def held_memory() -> int:
    """Bytes that this process holds and no file does: mapped files are given back when memory is needed. The peak of
    all where the system does not tell."""
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"RssAnon:\s+(\d+) kB", status.read_text(encoding="utf-8"))):
        return 1024 * int(found[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def opening(run: Path, commits: int, folder: Path) -> float:
    """Seconds of CPU to open the run as it was after so many commits."""
    import perpetune as pt

    short = folder / f"{commits}"
    shutil.copytree(run, short, ignore=shutil.ignore_patterns("commits", "logs"))
    (short / "commits").mkdir()
    for commit in sorted((run / "commits").iterdir())[:commits]:
        shutil.copytree(commit, short / "commits" / commit.name, copy_function=os.link)  # eight gigabytes of some
    found = []
    for _ in range(3):
        begun = process_time()
        pt.Learner.open(short)
        found.append(process_time() - begun)
    return min(found)


def one(recipe: str, tasks: int) -> dict[str, Any]:
    """The figures of one recipe, by task."""
    import perpetune as pt
    from perpetune.learning.task_loop import TaskLoop

    seconds: list[float] = []
    calls: list[int] = []
    memory: list[int] = []
    learn = TaskLoop.learn

    def measured(self: Any, session: Any) -> Any:
        # counting slows a task down: not those that are timed; the last evaluates all tasks
        counted = session.index % 10 == 8
        count = 0

        def profile(frame: Any, event: str, arg: Any) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        begun = process_time()
        if counted:
            sys.setprofile(profile)
        try:
            return learn(self, session)
        finally:
            sys.setprofile(None)
            if counted:
                calls.append(count)
            else:
                seconds.append(process_time() - begun)
            memory.append(held_memory())

    TaskLoop.learn = measured  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, data = make_model(folder / "model"), make_stream(folder / "stream", tasks)
        stream = pt.load_stream(data, scenario="class")
        options: dict[str, Any] = {"training": TRAINING, "evaluate_every": 0}
        learner = pt.Learner(model, NAMES.get(recipe, recipe), folder / "run", **options)
        result = learner.learn(stream)
        begun = process_time()
        pt.Result(result.path).summary()
        report = process_time() - begun
        return {
            "recipe": recipe,
            "tasks": tasks,
            "task_seconds": seconds,
            "calls": calls,
            "held_bytes": memory,
            "disk_bytes": [commit.size for commit in result.commits[1:]],
            "opening_seconds": {n: opening(result.path, n + 1, folder / "short") for n in (FIRST, tasks)},
            "summary_seconds": report,
            "final_accuracy": result.matrix(*result.readings[0]).values[-1].mean().item(),
        }


def compared(found: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Each figure at task 10 and at the last."""

    def at(values: Sequence[float], first: slice, last: int) -> tuple[float, float]:
        return statistics.median(values[first]), statistics.median(values[-last:])

    early, late = found["opening_seconds"].values()
    return {
        "a task, ms of CPU": tuple(1e3 * x for x in at(found["task_seconds"], slice(5, 15), 10)),  # type: ignore[dict-item]
        "a task, 1,000 calls": (found["calls"][0] / 1e3, found["calls"][-1] / 1e3),
        "memory, MB": (found["held_bytes"][FIRST - 1] / 1e6, found["held_bytes"][-1] / 1e6),
        "disk of a task, kB": tuple(x / 1e3 for x in at(found["disk_bytes"], slice(5, 15), 11)),  # type: ignore[dict-item]
        "opening, ms of CPU": (1e3 * early, 1e3 * late),
    }


def show(record: dict[str, Any], header: bool) -> None:
    figures, last = compared(record), record["tasks"]
    if header:
        print(f"| recipe | {' | '.join(f'{name}: task {FIRST} / {last} / ratio' for name in figures)} |")
        print("| --- |" + " --- |" * len(figures))
    cells = [f"{a:.3g} / {b:.3g} / **{b / a:.2f}**" for a, b in figures.values()]
    print(f"| `{record['recipe']}` | {' | '.join(cells)} |", flush=True)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    if options.one:
        print(json.dumps(one(options.one, options.tasks)))
        return []
    records: list[dict[str, Any]] = []
    for recipe in options.recipes.split(","):
        command = [sys.executable, "-m", "benchmarks.many_tasks", "--one", recipe, "--tasks", str(options.tasks)]
        begun = perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        records.append(json.loads(done.stdout.splitlines()[-1]))
        show(records[-1], header=len(records) == 1)
        print(f"{recipe}: {perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
    return records


OPTIONS = (
    Option("--one", None, argparse.SUPPRESS),
    Option("--tasks", 1000, "how many", least=2 * FIRST),
    Option("--recipes", ",".join(RECIPES), "names, with commas"),
)
# a row is printed as soon as it is there
main = Benchmark("many_tasks", __doc__, OPTIONS, measure, show=lambda records: None).main

if __name__ == "__main__":
    main()
