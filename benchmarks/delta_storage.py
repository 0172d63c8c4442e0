"""What sparse deltas take on disk, and what merging every week in half precision loses.

    python -m benchmarks.delta_storage --json delta_storage.json

Disk: the files of one task's delta of a ViT-B/16 (86M weights, fp32), keep 0.1, beside its dense fp32 delta.

Weekly merges: 52 updates of a bf16 weight, added one after the other to the bf16 weight, and added up in fp32 and
rounded once. The loss is |W_after - (W_0 + sum of updates)| / |sum of updates|, Frobenius; the updates are Gaussian,
their size is given relative to that of the weights.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from perpetune.deltas.extract import extract
from perpetune.deltas.storage import Storage

from .command import Benchmark, Option
from .delta_merge import ALL, BASE, change, mask, shapes

STORAGES: tuple[Storage, ...] = ("fp32", "bf16", "int8")
PROMISED = {"fp32": 0.1005, "bf16": 0.0505, "int8": 0.026}
WEEKS, SIDE = 52, 1024
SIZES = (1e-2, 3e-3, 1e-3, 3e-4)  # of a week's update, relative to the weights


def disk(parameters: int) -> list[dict]:
    """Bytes of a delta's files over those of the dense delta in fp32."""
    base = {name: torch.randn(shape) for name, shape in shapes(parameters).items()}
    tuned = {name: base[name] + d for name, d in change(base, 0).items()}
    records = []
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder, "dense.safetensors")
        save_file({name: tuned[name] - base[name] for name in base}, dense)
        for storage in STORAGES:
            delta = extract(base, tuned, mask("bernoulli", 0), fingerprint=BASE, storage=storage)
            path = Path(folder, "delta.safetensors")
            save_file(delta.to_tensors(), path)
            size = path.stat().st_size + len(json.dumps(delta.metadata()))
            share = size / dense.stat().st_size
            records.append(
                {"name": f"delta in {storage}", "mb": size / 1e6, "share": share, "at_most": PROMISED[storage]}
            )
    return records


def weekly(size: float, weeks: int = WEEKS, side: int = SIDE) -> dict:
    """The share of a year's updates that is lost by merging every week, and by merging once."""
    generator = torch.Generator().manual_seed(0)
    W_0 = torch.randn(side, side, generator=generator).bfloat16()
    merged, total = W_0.clone(), torch.zeros(side, side, dtype=torch.float64)
    for _ in range(weeks):
        update = size * torch.randn(side, side, generator=generator)
        merged = (merged.float() + update).bfloat16()  # what a weekly merge into the model's own type does
        total += update
    once = (W_0.double() + total).bfloat16()

    def lost(W: torch.Tensor) -> float:
        return float((W.double() - W_0.double() - total).norm() / total.norm())

    return {"name": f"{weeks} updates of {size:g}", "weekly": lost(merged), "once": lost(once)}


def measured(options: argparse.Namespace) -> list[dict]:
    return [*disk(options.parameters), *(weekly(size) for size in SIZES)]


def show(records: Sequence[dict]) -> None:
    for r in records:
        figures = {k: f"{v:.4g}" for k, v in r.items() if k != "name"}
        print(f"{r['name']:<24}", ", ".join(f"{k} {v}" for k, v in figures.items()))


OPTIONS = (Option("--parameters", ALL, "weights of ViT-B to use"),)
main = Benchmark("delta_storage", __doc__, OPTIONS, measured, show).main


if __name__ == "__main__":
    main()
