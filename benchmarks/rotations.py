"""What rotations cost in training, beside LoRA.

    python -m benchmarks.rotations --threads 1 --json rotations.json

Forward and backward of one linear layer d -> d with its adapter, the gradient of its input included, as in the middle
of a network. All methods stand in one process and take turns, in random order in each round. With one thread times are
of the processor, so that what else runs on the machine counts little; with several they are of the clock, for a thread
that waits for another takes time of its processor, too. Ratio = (median time) /
(median time of LoRA of rank 8). "frozen layer" has no adapter: what no method can go below. OFT is peft's, with blocks
of 32, once with the exact Cayley transform and once with its series of 5 terms, which is orthogonal for small angles
only.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import peft
import torch
from torch import nn

from perpetune.tuners import GivensConfig

from .command import (
    Benchmark,
    Option,
    WrongOption,
    figure,
    in_turns,
    processor_seconds,
    ratio,
    table,
    threads,
    wall_seconds,
)

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
    times = in_turns(runs, steps, processor_seconds if torch.get_num_threads() == 1 else wall_seconds)
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


def measured(options: argparse.Namespace) -> list[dict]:
    if any(d % 32 for d in options.widths):
        raise WrongOption("--widths must be multiples of 32, as the blocks of OFT are")
    return [r for d in options.widths for r in measure(d, options.tokens, max(1, options.steps * 768 // max(d, 768)))]


OPTIONS = (
    Option("--widths", [768, 4096], "d", type=int, nargs="+"),
    Option("--tokens", 1024, "rows of the input", least=1),
    Option("--steps", 15, "rounds at 768, fewer where wider", least=1),
    threads(),
)
COLUMNS = {
    "method": figure("name", "s"),
    "d": figure("width", "d"),
    "tokens": figure("tokens", "d"),
    "trained": figure("trained", ",d"),
    "ms": figure("ms", ".1f"),
    "ratio": ratio(".2f"),
    "fastest": figure("fastest", ".2f"),
    "at most": figure("target", ".1f"),
}
main = Benchmark("rotations", __doc__, OPTIONS, measured, table(COLUMNS)).main


if __name__ == "__main__":
    main()
