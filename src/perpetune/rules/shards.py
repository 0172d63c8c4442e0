"""Weights of which every process holds some rows (FSDP2), and data of which every process sees a part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..core.errors import RuleError

ROWS = "shard it by rows, as FSDP2 (torch.distributed.fsdp.fully_shard) does by default"


def sharded(t: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which this process holds some rows or a copy."""
    return hasattr(t, "to_local")


def local(t: Tensor) -> Tensor:
    """What this process holds of a tensor: a view, so that it may be edited in place."""
    return cast(Any, t).detach().to_local() if sharded(t) else t


def whole(t: Tensor) -> Tensor:
    """The whole tensor, on every process. A collective call where it is sharded: every process must make it."""
    return cast(Any, t).detach().full_tensor() if sharded(t) else t.detach()


def rows_here(p: Tensor) -> slice:
    """Which rows of a tensor this process holds.

    Raises:
        RuleError: it is sharded by something else than rows.
    """
    if not sharded(p) or not p.ndim:
        return slice(None)
    from torch.distributed.tensor import distribute_tensor

    placements = cast(Any, p).placements
    if not all(place.is_replicate() or place.is_shard(0) for place in placements):
        raise RuleError(f"a weight {tuple(p.shape)} is sharded by columns, as tensor parallelism does: {ROWS}")
    mesh = cast(Any, p).device_mesh
    numbers = torch.arange(len(p), device=mesh.device_type)
    mine = distribute_tensor(numbers, mesh, placements, src_data_rank=None).to_local()
    return slice(int(mine[0]), int(mine[-1]) + 1) if len(mine) else slice(0, 0)


def cut(values: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that this process holds of `like`."""
    return values[rows_here(like)] if sharded(like) and like.ndim else values


def gathered(rows: Tensor, like: Tensor) -> Tensor:
    """Inverse of `cut`: the whole, of what every process holds. A collective call."""
    if not sharded(like):
        return rows
    from torch.distributed.tensor import DTensor

    known = cast(Any, like)
    parts = DTensor.from_local(
        rows, known.device_mesh, known.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return parts.full_tensor()


# ---- models in wrappers ----

_WRAPPED = ("_orig_mod.", "_checkpoint_wrapped_module.")


def plain_name(name: str) -> str:
    """The name of a module or parameter without what compiling and checkpointing parts of a model add."""
    for part in _WRAPPED:
        name = name.replace(part, "")
    return name


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, whose names are those of one process: out of DDP and `torch.compile`."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = cast(nn.Module, model._orig_mod)
        else:
            return model


def check_frozen(model: nn.Module, trained: Sequence[nn.Parameter]) -> None:
    """
    Args:
        trained: what trained before rules began.

    Raises:
        RuleError: rules froze some of it, and DDP would wait for its gradients.
    """
    waits = isinstance(model, nn.parallel.DistributedDataParallel) and not model.find_unused_parameters
    if waits and not all(p.requires_grad for p in trained):
        raise RuleError(
            "a rule freezes weights, for whose gradients DDP waits: make DDP with find_unused_parameters=True, or call "
            "begin_task of the rules before DDP is made, and attach with begin=False"
        )


def reshard(model: nn.Module) -> None:
    """FSDP2 leaves a root's weights whole after a forward pass with no backward one: what trains are the shards."""
    for module in model.modules():
        if hasattr(module, "reshard"):  # FSDPModule, whose import takes a second
            module.reshard()  # type: ignore[operator]


def check_parallel(model: nn.Module, optimizer: Any = None) -> None:
    """
    Raises:
        RuleError: weights are kept in a way in which no rule finds them.
    """
    kinds = {type(module).__name__ for module in model.modules()}
    parts = (model, optimizer, getattr(optimizer, "optimizer", None))
    if any(type(part).__module__.startswith("deepspeed") or "DeepSpeed" in type(part).__name__ for part in parts):
        raise RuleError("DeepSpeed steps on weights of its own, which no rule sees: use DDP or FSDP2 (accelerate)")
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        raise RuleError("DeepSpeed ZeRO-3 takes the weights away between steps: use FSDP2 (accelerate) with rules")
    if "FullyShardedDataParallel" in kinds:
        raise RuleError("FSDP1 flattens weights, so that no rule finds them: use FSDP2 (accelerate's fsdp_version: 2)")
    if "DataParallel" in kinds:
        raise RuleError("DataParallel does not go with rules: start with torchrun and use DDP, or show one GPU alone")
