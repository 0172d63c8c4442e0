"""What masks by seed cost: making them, taking a delta, and adding up ten deltas.

    python -m benchmarks.delta_merge --json delta_merge.json

fp32 weights in the shapes of ViT-B/16 (86M), ten deltas of keep 0.1 stored as seed and fp32 values. Every ratio is to
copying the same weights once. All that is compared runs in one process and in turns, in random order; times are those
of the processor, on one thread, so that others on the machine disturb them little. Ratio: of the medians; `fastest`: of
the shortest times. Beside it peft's own dense functions on the same (unmasked) deltas, which need all ten at once:
3.4 GB and more; `--peft-parameters` gives them fewer weights, and a copy of as many to be compared with.

Peak memory of a merge is read in a process of its own, beside the base and the deltas (Linux only).
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from perpetune.deltas.combine import merge
from perpetune.deltas.delta import Delta
from perpetune.deltas.extract import extract
from perpetune.deltas.seeded_mask import Scheme, SeededMask, tensor_id
from perpetune.deltas.storage import Part

from .command import Benchmark, Option, WrongOption, figure, in_turns, ratio, table

TASKS, KEEP, BASE = 10, 0.1, "benchmark"
SCHEMES: tuple[Scheme, ...] = ("stratified", "bernoulli")
ALL = 85_798_656  # ViT-B/16 without pooler and head
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Work:
    """One line of the table: what is timed, the copy that it is compared with, and the ratio it must not exceed."""

    name: str
    run: Callable[[], object]
    copy: str = "copy"
    target: float | None = None


def shapes(parameters: int) -> dict[str, tuple[int, ...]]:
    """The tensors of ViT-B/16 in their order, the last one cut, so that there are `parameters` numbers."""
    found: dict[str, tuple[int, ...]] = {}
    left = parameters
    for name, shape in vit_b():
        size = math.prod(shape)
        found[name] = shape if size <= left else (left,)
        left -= min(size, left)
        if not left:
            break
    return found


def vit_b() -> Iterator[tuple[str, tuple[int, ...]]]:
    d, mlp = 768, 3072
    yield "embeddings.patch_embeddings.projection.weight", (d, 3, 16, 16)
    yield "embeddings.patch_embeddings.projection.bias", (d,)
    yield "embeddings.cls_token", (1, 1, d)
    yield "embeddings.position_embeddings", (1, 197, d)
    maps = {"attention.attention.query": (d, d), "attention.attention.key": (d, d), "attention.attention.value": (d, d)}
    maps |= {"attention.output.dense": (d, d), "intermediate.dense": (mlp, d), "output.dense": (d, mlp)}
    for layer in range(12):
        for norm in ("layernorm_before", "layernorm_after"):
            yield f"encoder.layer.{layer}.{norm}.weight", (d,)
            yield f"encoder.layer.{layer}.{norm}.bias", (d,)
        for name, shape in maps.items():
            yield f"encoder.layer.{layer}.{name}.weight", shape
            yield f"encoder.layer.{layer}.{name}.bias", shape[:1]
    yield "layernorm.weight", (d,)
    yield "layernorm.bias", (d,)


def change(base: Weights, task: int) -> Weights:
    """The dense delta of one task."""
    generator = torch.Generator().manual_seed(task)
    return {name: 1e-3 * torch.randn(t.shape, generator=generator) for name, t in base.items()}


def mask(scheme: Scheme, task: int) -> SeededMask:
    return SeededMask.of(scheme, KEEP, seed=0, task_key=task + 1)


def works(parameters: int, peft_parameters: int) -> list[Work]:
    """Everything to be timed, with what it needs in memory."""
    base = {name: torch.randn(shape) for name, shape in shapes(parameters).items()}
    room = {name: torch.zeros_like(t) for name, t in base.items()}
    deltas: dict[str, list[Delta]] = {scheme: [] for scheme in SCHEMES}
    few = shapes(peft_parameters)
    dense: list[list[Tensor]] = [[] for _ in few]
    for task in range(TASKS):
        changed = change(base, task)
        for tensors, (name, shape) in zip(dense, few.items(), strict=True):
            tensors.append(changed[name].view(-1)[: math.prod(shape)].view(shape).clone())
        tuned = {name: base[name] + d for name, d in changed.items()}
        for scheme in SCHEMES:
            deltas[scheme].append(extract(base, tuned, mask(scheme, task), fingerprint=BASE))

    def make_mask(scheme: Scheme) -> None:
        for name, t in base.items():
            for _ in mask(scheme, 0).chunks(tensor_id(name), t.numel()):
                pass

    def merge_all(scheme: Scheme) -> None:
        for _, tensor in merge(base, deltas[scheme], fingerprint=BASE):
            del tensor

    found = [Work("copy", lambda: [room[name].copy_(t) for name, t in base.items()])]
    for scheme in SCHEMES:
        stratified = scheme == "stratified"
        found += [
            Work(f"mask, {scheme}", lambda s=scheme: make_mask(s), target=1.5 if stratified else None),
            Work(f"extract, {scheme}", lambda s=scheme: extract(base, tuned, mask(s, 0), fingerprint=BASE)),
            Work(f"merge of {TASKS}, {scheme}", lambda s=scheme: merge_all(s), target=30 if stratified else None),
        ]
    if peft_parameters:
        from peft.utils.merge_utils import dare_linear, dare_ties  # here: the process of `peak_memory` needs no peft

        weights = torch.ones(TASKS)
        rooms = [torch.zeros_like(tensors[0]) for tensors in dense]
        copy = "copy of as many as peft gets"
        found += [
            Work(copy, lambda: [r.copy_(d[0]) for r, d in zip(rooms, dense, strict=True)], copy),
            Work("peft dare_linear", lambda: [dare_linear(d, weights, KEEP) for d in dense], copy),
            Work("peft dare_ties", lambda: [dare_ties(d, weights, KEEP) for d in dense], copy),
        ]
    return found


def measure(todo: Sequence[Work], repeats: int) -> list[dict]:
    """Records of everything but the copies."""
    seconds = in_turns({work.name: work.run for work in todo}, repeats, timed)
    records = []
    for work in todo:
        own, copy = seconds[work.name], seconds[work.copy]
        times = {"ms": 1e3 * statistics.median(own), "copy_ms": 1e3 * statistics.median(copy)}
        ratios = {"ratio": times["ms"] / times["copy_ms"], "fastest": min(own) / min(copy)}
        if work.name != work.copy:
            records.append({"name": work.name, **ratios, **times, "target": work.target, "repeats": repeats})
    return records


def timed(run: Callable[[], object], least: float = 0.02) -> float:
    """Processor seconds of one run; short ones are repeated until they can be told from the clock's own error."""
    start, count = time.process_time(), 0
    while not count or time.process_time() - start < least:
        run()
        count += 1
    return (time.process_time() - start) / count


def peak_memory(parameters: int) -> dict | None:
    """Bytes that a merge needs beside the base and the deltas, in a new process; None where this cannot be told."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        extra = pool.apply(_peak_memory, (parameters,))
    if extra is None:
        return None
    largest = 4 * max(math.prod(shape) for shape in shapes(parameters).values())
    sizes = {"mb": extra / 1e6, "base_mb": 4 * parameters / 1e6, "largest_tensor_mb": largest / 1e6}
    return {
        "name": f"memory of a merge of {TASKS}, stratified",
        "ratio": extra / (4 * parameters),
        **sizes,
        "target": None,
    }


def _peak_memory(parameters: int) -> int | None:
    torch.set_num_threads(1)
    for size in (1000, parameters):  # the first loads the code that a merge needs
        base = {name: torch.ones(shape) for name, shape in shapes(size).items()}
        deltas = [ones(base, mask("stratified", task)) for task in range(TASKS)]
        before = resident_peak()
        for _, tensor in merge(base, deltas, fingerprint=BASE):
            del tensor
        after = resident_peak()
    return None if before is None or after is None else after - before


def ones(base: Weights, m: SeededMask) -> Delta:
    """A delta whose every value is 1: nothing but itself has been in memory."""
    counts = {name: m.count(tensor_id(name), t.numel()) for name, t in base.items()}
    parts = {name: Part(tuple(t.shape), "seed", torch.ones(counts[name])) for name, t in base.items()}
    return Delta(m, BASE, "fp32", parts)


def resident_peak() -> int | None:
    """The most memory that this process has had, in bytes."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return 1024 * int(found[1]) if found else None


def measured(options: argparse.Namespace) -> list[dict]:
    for_peft = options.parameters if options.peft_parameters is None else options.peft_parameters
    if not 1000 <= options.parameters <= ALL:
        raise WrongOption(f"--parameters must be from 1000 to {ALL}")
    if not 0 <= for_peft <= options.parameters:
        raise WrongOption("--peft-parameters must be from 0 to --parameters")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    memory = peak_memory(options.parameters)
    records = measure(works(options.parameters, for_peft), options.repeats)
    records = [{**r, "parameters": for_peft if "peft" in r["name"] else options.parameters} for r in records]
    return records + ([] if memory is None else [{**memory, "parameters": options.parameters}])


OPTIONS = (
    Option("--parameters", ALL, "weights of ViT-B to use"),
    Option("--peft-parameters", None, "weights for peft's functions, 0 for none (default: all)", type=int),
    Option("--repeats", 5, "runs to take the medians of", least=1),
)
COLUMNS = {
    "work": figure("name", "s"),
    "own": lambda r: f"{r['mb']:.1f} MB" if "mb" in r else f"{r['ms']:.1f} ms",
    "copy": lambda r: f"{r['base_mb']:.1f} MB" if "mb" in r else f"{r['copy_ms']:.2f} ms",
    "ratio": ratio(".3f"),
    "fastest": figure("fastest", ".2f"),
    "at most": figure("target", "g"),
}
main = Benchmark("delta_merge", __doc__, OPTIONS, measured, table(COLUMNS)).main


if __name__ == "__main__":
    main()
