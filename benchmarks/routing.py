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
import random
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import datasets
import torch
from torch import Tensor

import perpetune as pt
from perpetune.consolidation import Session
from perpetune.models.loading import load_backbone
from perpetune.routers import KMeansRouter, RidgeRouter, Router
from perpetune.runs.directory import Run
from perpetune.streams import Stream, Task

from .command import (
    Benchmark,
    Option,
    WrongOption,
    bundled_model,
    figure,
    in_turns,
    quiet_transformers,
    ratio,
    table,
)

TEXTS, GROUP = 5, 4  # of a task: as many as centres, so that each is a centre; how many are asked in a batch
SHORTEST, LONGEST, MAX_LENGTH = 5, 40, 64  # words of a text, tokens
SPREAD = 0.02  # standard deviation of an adapter's values
SAMPLES = 100  # of a task, for the router that needs more than a few
RECIPE = "color"


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


def medians(works: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median processor time of each work in ms."""
    return {name: 1e3 * statistics.median(seconds) for name, seconds in in_turns(works, repeats).items()}


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
    return [{"name": name, "ms": ms} for name, ms in medians(works, repeats).items()]


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
    times = medians(works, repeats)
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
    records: list[dict] = [{"name": name, "ms": ms} for name, ms in medians(works, repeats).items()]
    return [*records, *({"name": f"{name}, stored for {tasks} tasks", "mb": mb} for name, mb in sizes.items())]


def measured(options: argparse.Namespace) -> list[dict]:
    if not 1 <= options.routes <= options.adapters:
        raise WrongOption("--routes must be between 1 and --adapters")
    torch.set_num_threads(1)
    quiet_transformers()
    model = options.model or bundled_model()
    with tempfile.TemporaryDirectory() as folder:
        stream = make_run(model, Path(folder), options.adapters)
        records = measure_opening(model, Path(folder), min(options.repeats, 5))
        learner = pt.Learner.open(Path(folder), model=model, device="cpu")
        records += measure_memory(learner, Path(folder))
        records += measure_predicting(learner, stream, options.routes, options.repeats)
    return records + measure_routers(learner.backbone.width, options.adapters, options.routes * GROUP, options.repeats)


OPTIONS = (
    Option("--model", None, "folder or hub id of a text encoder (default: the bundled MiniLM)"),
    Option("--adapters", 200, "tasks of the run"),
    Option("--routes", 16, "tasks in a mixed batch"),
    Option("--repeats", 9, "of which medians are taken", least=1),
)
COLUMNS = {
    "what": figure("name", "s"),
    "MB": figure("mb", ".3g"),
    "ms": figure("ms", ".3g"),
    "ms per input": figure("ms_per_input", ".3g"),
    "ratio": ratio(".3g"),
    "at most": figure("target", ".2f"),
}
main = Benchmark("routing", __doc__, OPTIONS, measured, table(COLUMNS)).main


if __name__ == "__main__":
    main()
