"""How the LoRA updates of a run's tasks lie to each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..core.errors import ConfigError
from ..metrics import geometry as g

if TYPE_CHECKING:
    from .result import Result


def geometry(result: Result, tolerance: float) -> dict[str, float | None]:
    """See `Result.geometry`."""
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
    layers = list(zip(*tasks, strict=True))
    last = [updates[-1] for updates in layers]
    return {
        "average_collision_rate": g.pooled_collision_rate(layers, tolerance),
        "subspace_overlap": sum(g.subspace_overlap([u.A for u in past], now.A) for *past, now in layers),
        "awom": sum(g.awom(torch.cat([u.A for u in past]), now.A) for *past, now in layers if past),
        "nuclear_norm": sum(g.nuclear_norm(*u) for task in tasks for u in task) / (len(tasks) * len(last)),
        "zero_share": sum(g.sparsity(u).zero_share for u in last) / len(last),
        "above_share": sum(g.sparsity(u).above_share for u in last) / len(last),
    }
