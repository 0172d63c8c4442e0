"""What each rule adds to a training step.

    python -m benchmarks.step_overhead --json step_overhead.json

MiniLM (or another encoder), batches of 32 x 64 tokens, AdamW. What trains is a LoRA of rank 8, rotations of what linear
layers read, or all weights. In one process and in turns: a plain step (forward, backward, optimizer), then every rule's
own work on the gradients and weights of that step, copies of the weights that it watches included, in random order, the
caches emptied before each. Ratio = 1 + (the rule's median time) / (the plain step's median time): whole steps with and
without a rule differ by less than the noise between two steps. `fastest` is the same ratio of the shortest times, which
says more on a machine that others use too. With --threads 1, time is that of the processor: others add little to it.

Subspace projection protects half of the directions of every input, the most that cap=0.5 allows. It has a row of its
own for one wide layer (q and v with LoRA of rank 16): there the plain step is forward and backward of that layer alone.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import peft
import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from perpetune.rules import (
    FixedMask,
    OrthogonalToPast,
    ProductL1,
    ReleasedProductL1,
    RotationBall,
    Rule,
    SoftOrthogonal,
    StepMask,
    SubspaceProjection,
    TaskContext,
    lora_pairs,
)
from perpetune.tuners import GivensConfig

from .command import Benchmark, Option, bundled_model, figure, quiet_transformers, ratio, table, threads

BATCH, LENGTH, RANK, WIDE_RANK = 32, 64, 8, 16
LOOKED_AT = 8  # examples by whose gradients a mask is chosen
LORA: dict[str, list[str] | str] = {"q,v": ["query", "value"], "all linear": "all-linear"}
WEIGHTS, GIVENS, OFT, WIDE = "all weights", "Givens, all linear", "OFT, all linear", "wide"
SITES = (*LORA, WEIGHTS, GIVENS, OFT, WIDE)


@dataclass(frozen=True)
class Row:
    """One line of the table: a rule at some task, and the ratio it must not exceed (None: nothing is asked)."""

    name: str
    make: Callable[[], Rule]
    task: int
    target: float | None = 1.01


def rows(site: str) -> list[Row]:
    """The rules to measure; the released L1 form exists for square layers only."""
    if site == WEIGHTS:
        return [
            Row("step_mask 0.3, gradient", lambda: StepMask(0.3, "gradient"), 1),
            Row("step_mask 0.3, update", lambda: StepMask(0.3, "update"), 1),
            Row("fixed_mask 0.3, embeddings free", lambda: FixedMask(0.3, "fisher", embeddings="free"), 1),
            Row("fixed_mask 0.005", lambda: FixedMask(0.005, "gradient"), 1),
        ]
    if site == GIVENS:
        return [Row("soft_orthogonal", lambda: SoftOrthogonal(1e-3), 1)]
    if site == OFT:
        return [Row("rotation_ball", lambda: RotationBall(1e-3), 1)]
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


def build(model: str, site: str) -> nn.Module:
    """The encoder with what trains at this site; weights of adapters are not those of the start, as in a task."""
    torch.manual_seed(0)
    base = transformers.AutoModel.from_pretrained(model, add_pooling_layer=False)
    if site == WEIGHTS:
        return base.train()
    adapted = peft.get_peft_model(base, config(site))
    for p in (p for p in adapted.parameters() if p.requires_grad):
        p.data.add_(torch.randn_like(p), alpha=0.01)
    return adapted.train()


def config(site: str) -> peft.PeftConfig:
    if site == GIVENS:
        return GivensConfig(form="quasi", target_modules="all-linear")
    if site == OFT:
        return peft.OFTConfig(oft_block_size=32, use_cayley_neumann=False, target_modules="all-linear")
    return peft.LoraConfig(r=RANK, lora_alpha=32, target_modules=LORA[site])


class Wide(nn.Module):
    """q and v of one layer, d x d."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.v = (nn.Linear(width, width, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x).square().mean() + self.v(x).square().mean()


def at_task(rule: Rule, model: nn.Module, task: int, batch: dict[str, Tensor]) -> Rule:
    """The rule as it is in this task (1-based), with a random A and the same inputs for every task before it."""

    def losses(examples: int) -> Iterator[Tensor]:
        ids = batch["input_ids"][:LOOKED_AT]
        return (loss(model, {"input_ids": part}) for part in ids.split(examples))

    context = [TaskContext(model, index, lambda: [batch], losses) for index in range(task)]
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


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).last_hidden_state.abs().mean()  # of squares a layer norm would leave no gradient


def measure(model_name: str, site: str, steps: int) -> list[dict]:
    """Records of all rules at one site."""
    model = build(model_name, site)
    batch = random_batch(model)
    asked = rows(site)
    rules = [at_task(row.make(), model, row.task, batch) for row in asked]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)  # what transformers.Trainer takes if not told otherwise

    def step() -> None:
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()

    records = in_turns(step, rules, steps)
    adapted = sum(isinstance(module, BaseTunerLayer) for module in model.modules())
    for record, row in zip(records, asked, strict=True):
        name = f"{row.name}, task {row.task} ({site})"
        record.update(name=name, target=row.target, site=site, layers=adapted)
    if site not in LORA:
        return records
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
    for pair in lora_pairs(model):
        nn.init.normal_(pair.B)  # as in a task: what a B of 0 reads is not protected
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
    """Times of every rule's own work after plain steps, as `attach` would have it done."""
    evict = torch.zeros(2**24)  # 64 MB, more than the caches hold
    shuffle = random.Random(0)
    plain: list[float] = []
    own: list[list[float]] = [[] for _ in rules]
    watched: list[list[Tensor]] = [list(rule.watches()) for rule in rules]
    copies = [[torch.empty_like(p) for p in params] for params in watched]

    @torch.no_grad()
    def work(which: int) -> None:
        if watched[which]:
            torch._foreach_copy_(copies[which], watched[which])
        rules[which].on_gradient()
        rules[which].on_update(copies[which])

    for number in range(warmup + steps):
        seconds = timed(step)
        if number >= warmup:
            plain.append(seconds)
        for which in shuffle.sample(range(len(rules)), len(rules)):
            evict.add_(1)
            seconds = timed(partial(work, which))
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
            "clock": clock().__name__,
        }
        for seconds in own
    ]


def clock() -> Callable[[], float]:
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def timed(work: Callable[[], None]) -> float:
    now = clock()
    start = now()
    work()
    return now() - start


def measured(options: argparse.Namespace) -> list[dict]:
    model = options.model or bundled_model()
    quiet_transformers()
    records = []
    for site in options.sites:
        wide = site == WIDE
        records += [measure_wide(options.width, options.steps)] if wide else measure(model, site, options.steps)
    return records


OPTIONS = (
    Option("--model", None, "folder or hub id of an encoder (default: the bundled MiniLM)"),
    Option("--sites", SITES, "what to measure", nargs="+", choices=SITES),
    Option("--steps", 15, "steps to take the medians of", least=1),
    Option("--width", 4096, "inputs of the wide layer", least=32),
    threads(),
)
COLUMNS = {
    "rule": figure("name", "s"),
    "own ms": figure("rule_ms", ".1f"),
    "step ms": figure("plain_step_ms", ".1f"),
    "ratio": ratio(".4f"),
    "fastest": figure("fastest", ".4f"),
    "at most": figure("target", ".2f"),
}
main = Benchmark("step_overhead", __doc__, OPTIONS, measured, table(COLUMNS)).main


if __name__ == "__main__":
    main()
