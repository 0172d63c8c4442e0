"""What subspace projection certifies, held against the old tokens themselves, over many tasks.

    python -m benchmarks.certificate

One linear layer (d = 128, 32 outputs) learns one task after another, a few steps of AdamW with weight decay each. The
rule keeps a second moment or a sketch of its inputs; the benchmark keeps all tokens, and measures on them what every
task changed and what became of all old outputs. Writes certificate.md and capacity.svg.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perpetune.rules import SubspaceProjection, TaskContext, attach

from .certificate_page import capacity, page
from .command import Benchmark, Option, threads

WIDTH, OUT, STEPS = 128, 32, 4  # d, outputs, optimizer steps of a task
CORE, NOISE, FRESH, SKETCH = 24, 0.02, 6, 48  # directions, and rows of a sketch
AT_ONCE = 50  # tasks whose change is measured in one product


@dataclass(frozen=True)
class Row:
    """One line of the tables.

    Attributes:
        stream: "shared": inputs have a core of directions and a little noise; "fresh": new directions every task.
        memory: "none" (no rule), "C", "sketch" or "cap 0.5".
        dtype: of weights and tokens.
        line: its name in the picture; "" for none.
    """

    stream: str
    memory: str
    energy: float
    dtype: torch.dtype = torch.float32
    line: str = ""

    def rule(self) -> SubspaceProjection:
        special: dict[str, Any] = {"sketch": {"wide": WIDTH - 1, "sketch_rows": SKETCH}, "cap 0.5": {"cap": 0.5}}
        return SubspaceProjection(self.energy, unit_tokens=False, **special.get(self.memory, {}))


ROWS = [
    Row("shared", "none", 1),
    Row("shared", "C", 0.99, line="shared, energy 0.99"),
    Row("shared", "C", 0.99, torch.float64),
    Row("shared", "sketch", 0.99),
    Row("shared", "C", 1),
    Row("shared", "C", 1, torch.float64),
    Row("fresh", "none", 1),
    Row("fresh", "C", 0.99),
    Row("fresh", "C", 1, line="fresh, energy 1"),
    Row("fresh", "C", 1, torch.float64),
    Row("fresh", "cap 0.5", 1, line="fresh, energy 1, cap 0.5"),
    Row("fresh", "sketch", 1, line=f"fresh, energy 1, sketch of {SKETCH} rows"),
]


@dataclass
class Found:
    """What was found of a row; lists have one entry for each task after the first.

    Attributes:
        drift: |dW x| / |x| over all old tokens, tasks counting alike, measured on the tokens.
        claimed: the rule's own figure of it, from its memory; bound: what the rule certifies of it.
        broken: promises that the rule itself reports as broken.
        used: k / d.
        total: |(W_end - W_s) x| / |x| over the tokens x of all tasks s: what became of old outputs in the end.
        outputs: the same relative to |W_s x|, what the outputs were when their task was learned.
        total_bound: what the bounds of all tasks together say of `total`.
        size: number of tasks -> bytes of the rule's state.
        slower: number of tasks -> time of the rule's part of a step and of end_task, over those at the first of them.
    """

    drift: list[float] = field(default_factory=list)
    claimed: list[float] = field(default_factory=list)
    bound: list[float] = field(default_factory=list)
    broken: int = 0
    used: list[float] = field(default_factory=list)
    total: float = 0.0
    outputs: float = 0.0
    total_bound: float = 0.0
    size: dict[int, int] = field(default_factory=dict)
    slower: dict[int, tuple[float, float]] = field(default_factory=dict)

    @property
    def violations(self) -> int:
        """Tasks whose drift is above what is certified of it, or no number."""
        return sum(not drift <= bound for drift, bound in zip(self.drift, self.bound, strict=True))

    @property
    def nearest(self) -> float:
        """The largest share of its bound that the drift of a task took."""
        return max(drift / bound for drift, bound in zip(self.drift, self.bound, strict=True))


# ---- the tasks ----


def tokens(stream: str, task: int, dtype: torch.dtype) -> Tensor:
    """(n x d), n about 200; their length differs from task to task."""
    random = torch.Generator().manual_seed(task)
    n = int(torch.randint(160, 241, (), generator=random))
    if stream == "shared":
        core = directions(torch.Generator().manual_seed(10**6), CORE)
        X = torch.randn(n, CORE, generator=random, dtype=torch.float64) @ core
        X += NOISE * torch.randn(n, WIDTH, generator=random, dtype=torch.float64)
    else:
        X = torch.randn(n, FRESH, generator=random, dtype=torch.float64) @ directions(random, FRESH)
    return (X * (1 + 9 * torch.rand((), generator=random))).to(dtype)


def directions(random: torch.Generator, number: int) -> Tensor:
    """number x d, orthonormal rows."""
    return torch.linalg.qr(torch.randn(WIDTH, number, generator=random, dtype=torch.float64)).Q.mT


def layer(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, OUT, bias=False, dtype=dtype)


def batches(X: Tensor) -> Callable[[], Iterable[dict[str, Tensor]]]:
    return lambda: [{"input": X}]


def learn(model: nn.Module, rules: list[SubspaceProjection], task: TaskContext, X: Tensor) -> None:
    """A few steps towards a random linear map."""
    random = torch.Generator().manual_seed(2 * 10**6 + task.index)
    target = X @ torch.randn(WIDTH, OUT, generator=random, dtype=X.dtype) / X.norm(dim=1).mean()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
    attached = attach(model, optimizer, rules, index=task.index, batches=task.batches)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (model(X) - target).square().mean().backward()
        optimizer.step()
    attached.remove()


# ---- what is measured ----


def measure(row: Row, tasks: int, rounds: int) -> Found:
    """Learn all tasks of a row; end_task is timed `rounds` times, the step ten times as often."""
    found, model = Found(), layer(row.dtype)
    rules = [] if row.memory == "none" else [row.rule()]
    X = [tokens(row.stream, task, row.dtype) for task in range(tasks)]
    weights: list[Tensor] = []
    states: dict[int, dict[str, Tensor]] = {}
    for index, x in enumerate(X):
        task = TaskContext(model, index, batches(x))
        learn(model, rules, task, x)
        weights.append(next(model.parameters()).detach().clone())
        for rule in rules:
            if index:
                promises = rule.guarantee()
                _, drift, _, used, *_ = promises
                found.claimed.append(drift.value)
                found.bound.append(math.nan if drift.bound is None else drift.bound)
                found.broken += sum(promise.holds is False for promise in promises)
                found.used.append(used.value)
            rule.end_task(task)
            if index + 1 in checkpoints(tasks):
                states[index + 1] = rule.state()
    old_outputs(found, X, torch.stack(weights))
    found.size = {at: sum(t.numel() * t.element_size() for t in state.values()) for at, state in states.items()}
    found.slower = slower(row, states, tokens(row.stream, tasks, row.dtype), rounds) if rules else {}
    return found


def checkpoints(tasks: int) -> list[int]:
    return sorted({at for at in (10, 100, tasks) if at <= tasks})


def old_outputs(found: Found, X: Sequence[Tensor], weights: Tensor) -> None:
    """What each task, and all of them together, did to the tokens of the tasks before; weights (T x out x d).

    Tasks count alike, as in the rule: the tokens of each are divided by |X_s|, so that sum_old |x|^2 is their number.
    """
    changes = weights.double().diff(dim=0).to(weights.dtype)  # the first is that of the second task
    sums = torch.zeros(len(changes), dtype=torch.float64)
    total = outputs = 0.0
    for s, x in enumerate(X[:-1]):
        x = x / x.norm()
        for start in range(s, len(changes), AT_ONCE):
            dW = changes[start : start + AT_ONCE]
            y = (dW.flatten(0, 1) @ x.mT).view(len(dW), -1)
            sums[start : start + AT_ONCE] += torch.linalg.vector_norm(y, dim=1).double().square()
        total += float(((weights[-1] - weights[s]) @ x.mT).double().square().sum())
        outputs += float((weights[s] @ x.mT).double().square().sum())
    number = torch.arange(1, len(X), dtype=torch.float64)
    found.drift = (sums / number).sqrt().tolist()
    found.total, found.outputs = math.sqrt(total / len(changes)), math.sqrt(total / outputs)
    # |sum_t dW_t x| over all x is at most the sum of |dW_t x|, each over the tokens of the tasks before t.
    certified = zip(found.bound, number.sqrt().tolist(), strict=False)
    found.total_bound = sum(bound * root for bound, root in certified) / math.sqrt(len(changes))


def slower(row: Row, states: dict[int, dict[str, Tensor]], X: Tensor, rounds: int) -> dict[int, tuple[float, float]]:
    """The states in turns, on the same tokens: medians over those of the first state."""
    model = layer(row.dtype)
    task = TaskContext(model, 1, batches(X))
    rules = {at: row.rule() for at in states}
    step: dict[int, list[float]] = {at: [] for at in states}
    end: dict[int, list[float]] = {at: [] for at in states}
    for turn in range(rounds):
        for at in sorted(states, reverse=turn % 2 == 1):
            rules[at].load_state(states[at])
            rules[at].begin_task(task)
            step[at] += [timed(partial(rules[at].on_update, [])) for _ in range(10)]
            end[at].append(timed(partial(rules[at].end_task, task)))
    first = min(states)

    def ratio(times: dict[int, list[float]], at: int) -> float:
        return statistics.median(times[at]) / statistics.median(times[first])

    return {at: (ratio(step, at), ratio(end, at)) for at in states}


def timed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measured(options: argparse.Namespace) -> list[tuple[Row, Found]]:
    found = []
    for row in ROWS:
        found.append((row, measure(row, options.tasks, options.rounds)))
        print(f"{len(found)} of {len(ROWS)}: {row.stream}, {row.memory}", flush=True)
    given = "" if options.tasks == 1000 else f" --tasks {options.tasks}"
    text = page(found, options.tasks, f"python -m benchmarks.certificate{given}")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "certificate.md").write_text(text, encoding="utf-8")
    picture = capacity([(row.line, f.used) for row, f in found if row.line])
    (options.out / "capacity.svg").write_text(picture, encoding="utf-8")
    print(text)
    return found


OPTIONS = (
    Option("--tasks", 1000, "tasks of every run", least=11),
    Option("--rounds", 60, "rounds to take the medians of", least=1),
    threads(1),
    Option("--out", Path("docs/results"), "folder", type=Path),
)
main = Benchmark("certificate", __doc__, OPTIONS, measured).main


if __name__ == "__main__":
    main()
