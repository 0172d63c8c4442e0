"""What rotations cost in training, beside LoRA.

    python -m benchmarks.rotations --threads 1 --json rotations.json

Forward and backward of one linear layer d -> d with its adapter, the gradient of its input included, as in the middle
of a network. All methods stand in one process and take turns, in random order in each round. Times are of the
processor (of all threads together), so that what else runs on the machine counts little. Ratio = (median time) /
(median time of LoRA of rank 8). "frozen layer" has no adapter: what no method can go below. OFT is peft's, with blocks
of 32, once with the exact Cayley transform and once with its series of 5 terms, which is orthogonal for small angles
only.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

from perpetune.tuners import GivensConfig

REFERENCE = "LoRA, r = 8"
TARGETS = {768: 1.3, 4096: 1.1}
METHODS: dict[str, Callable[[], Any]] = {
    "frozen layer": lambda: None,
    REFERENCE: lambda: peft.LoraConfig(r=8, target_modules=["f"]),
    "OFT, exact": lambda: peft.OFTConfig(oft_block_size=32, use_cayley_neumann=False, target_modules=["f"]),
    "OFT, series": lambda: peft.OFTConfig(oft_block_size=32, use_cayley_neumann=True, target_modules=["f"]),
    "Givens, strict": lambda: GivensConfig(target_modules=["f"]),
    "Givens, norm": lambda: GivensConfig(form="norm", target_modules=["f"]),
    "Givens, quasi": lambda: GivensConfig(form="quasi", target_modules=["f"]),
    "Givens, strict, radix 16": lambda: GivensConfig(radix=16, target_modules=["f"]),
    "Givens, strict, radix 64": lambda: GivensConfig(radix=64, target_modules=["f"]),
    "Givens, strict, tree": lambda: GivensConfig(radix=1, target_modules=["f"]),
}


def measure(d: int, tokens: int, steps: int) -> list[dict]:
    """A record for every method at one width."""
    runs: dict[str, Callable[[], None]] = {}
    trained: dict[str, int] = {}
    torch.manual_seed(0)
    base = nn.Linear(d, d).requires_grad_(False)
    x, dy = torch.randn(tokens, d, requires_grad=True), torch.randn(tokens, d)
    for name, make in METHODS.items():
        model: Any = nn.ModuleDict({"f": base})  # all methods share one weight
        if config := make():
            model = peft.inject_adapter_in_model(config, model)
        layer = model["f"]
        own = [p for p in layer.parameters() if p.requires_grad]
        for p in own:
            p.data += 0.1 * torch.randn_like(p)
        trained[name] = sum(p.numel() for p in own)

        def step(layer: Any = layer, own: Sequence[nn.Parameter] = tuple(own)) -> None:
            for p in (x, *own):
                p.grad = None
            layer(x).backward(dy)

        runs[name] = step
    shuffle = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(1 + steps):  # one to warm up
        for name in shuffle.sample(list(runs), len(runs)):
            start = time.process_time()
            runs[name]()
            if number:
                times[name].append(time.process_time() - start)
    reference = times[REFERENCE]
    return [
        {
            "name": name,
            "width": d,
            "tokens": tokens,
            "trained": trained[name],
            "ms": 1e3 * statistics.median(seconds),
            "ratio": statistics.median(seconds) / statistics.median(reference),
            "fastest": min(seconds) / min(reference),
            "target": TARGETS.get(d) if name == "Givens, strict" and tokens == 1024 else None,
            "steps": steps,
            "threads": torch.get_num_threads(),
        }
        for name, seconds in times.items()
    ]


def show(records: Sequence[dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("method", "d", "tokens", "trained", "ms", "ratio", "fastest", "at most")
    for r in records:
        late = r["target"] is not None and r["ratio"] > r["target"]
        ratio = f"[red]{r['ratio']:.2f}[/red]" if late else f"{r['ratio']:.2f}"
        asked = "" if r["target"] is None else f"{r['target']:.1f}"
        counts = [str(r["width"]), str(r["tokens"]), f"{r['trained']:,}"]
        table.add_row(r["name"], *counts, f"{r['ms']:.1f}", ratio, f"{r['fastest']:.2f}", asked)
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rotations", description=__doc__.split("\n")[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[768, 4096], help="d (default: 768 4096)")
    parser.add_argument("--tokens", type=int, default=1024, help="rows of the input (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=15, help="rounds at 768, fewer where wider (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records there")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.steps < 1 or options.tokens < 1:
        parser.error("--steps and --tokens must be 1 or more")
    if any(d % 32 for d in options.widths):
        parser.error("--widths must be multiples of 32, as the blocks of OFT are")
    records = [
        r for d in options.widths for r in measure(d, options.tokens, max(1, options.steps * 768 // max(d, 768)))
    ]
    show(records)
    if options.json:
        options.json.write_text(json.dumps(records, indent=2) + "\n")
    return records


if __name__ == "__main__":
    main()
