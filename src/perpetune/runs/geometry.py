"""How the LoRA updates of a run's tasks lie to each other."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import torch

from ..core.errors import ConfigError
from ..metrics import geometry as g

if TYPE_CHECKING:
    from .result import Result


def updates(result: Result) -> list[tuple[g.Factors, ...]]:
    """For every layer the LoRA updates of all tasks, in order.

    Raises:
        ConfigError: see `Result.geometry`.
    """
    name, config = "adapter_model.safetensors", "adapter_config.json"
    if result.config["recipe"]["consolidation"]["type"] not in ("Merge", "Stack") or not all(
        c.has(name) and c.json(config).get("peft_type") == "LORA" for c in result.active
    ):
        raise ConfigError(f"{result.path} keeps no LoRA update of every task: geometry is for recipes such as `lora`")
    tasks = []
    for commit in result.active:
        tensors, settings = commit.tensors(name), commit.json(config)
        if settings.get("use_rslora") or settings.get("rank_pattern"):
            raise ConfigError("geometry needs one rank and the scale alpha / r for all layers")
        scale = settings["lora_alpha"] / settings["r"]
        names = sorted(k for k in tensors if "lora_A" in k)
        tasks.append([g.Factors(tensors[k.replace("lora_A", "lora_B")], tensors[k], scale) for k in names])
    return list(zip(*tasks, strict=True))


def geometry(result: Result, tolerance: float) -> dict[str, float | None]:
    """See `Result.geometry`."""
    layers = updates(result)
    last = [tasks[-1] for tasks in layers]
    sparse = [g.sparsity(update) for update in last]
    return {
        "average_collision_rate": g.pooled_collision_rate(layers, tolerance),
        "subspace_overlap": sum(g.subspace_overlap([u.A for u in past], now.A) for *past, now in layers),
        "awom": sum(g.awom(torch.cat([u.A for u in past]), now.A) for *past, now in layers if past),
        "nuclear_norm": statistics.fmean(g.nuclear_norm(*update) for tasks in layers for update in tasks),
        "zero_share": statistics.fmean(found.zero_share for found in sparse),
        "above_share": statistics.fmean(found.above_share for found in sparse),
    }
