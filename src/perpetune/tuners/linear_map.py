"""A trained parameter seen as the matrix of a linear map: what tuners offer, and what projection protects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.errors import RuleError


class Tap(nn.Module):
    """Shows a tensor to whoever listens through a forward pre-hook; does nothing else.

    A tuner layer whose parameters act on something that is no module's input (queries, attention weights) calls a tap
    with it, after asking `listening`, so that nothing is computed when nobody looks.
    """

    @property
    def listening(self) -> bool:
        return bool(self._forward_pre_hooks)

    def forward(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True)
class LinearMap:
    """A trained weight as W (out x d) of y = W x.

    Attributes:
        name: the same for every task's adapter: of the layer in the model, with a suffix where the layer has several
            maps (`<layer>.A` and `<layer>.B` for the factors of its LoRA).
        weight: the parameter, as the layer keeps it.
        modules: the modules whose first argument, or output, is x (... x d): layers, or taps; more than one where it is
            tied.
        view: makes W, a view, of the weight or of anything of its shape; None where the weight is W.
        rows: the dimension of the weight along which the rows of W lie: what may be sharded; None where none may.
        reads: whether x is the modules' input or their output.
        elementwise: y = w * x element by element: W is 1 x d, and x stands for the matrix diag(x).
    """

    name: str
    weight: nn.Parameter
    modules: tuple[nn.Module, ...]
    view: Callable[[Tensor], Tensor] | None = None
    rows: int | None = 0
    reads: Literal["input", "output"] = "input"
    elementwise: bool = False

    @property
    def width(self) -> int:
        """d."""
        return self._shape()[-1]

    def matrix(self, values: Tensor) -> Tensor:
        """A view, out x d, of the weight or of something of its shape; of sharded ones, the rows that are here.

        Raises:
            RuleError: it is sharded by columns of W, so that no row is here as a whole.
        """
        values = values.detach()
        if hasattr(values, "to_local"):
            sharded = [p for p in values.placements if p.is_shard()]  # type: ignore[attr-defined]
            if any(self.rows is None or not p.is_shard(self.rows) for p in sharded):
                rows = "leave it whole" if self.rows is None else "shard it by rows, as FSDP2 does by default"
                raise RuleError(f"`{self.name}` is sharded by input columns: {rows}")
            values = values.to_local()
        return values if self.view is None else self.view(values)

    def whole(self, rows: Tensor) -> Tensor:
        """The rows of all processes, from those that are here, as `matrix` gives them. A collective call where it is
        sharded: every process must make it."""
        if not self._sharded():
            return rows
        from torch.distributed.tensor import DTensor, Replicate, Shard

        weight: Any = self.weight
        shape = self._shape()
        placements = [Shard(0) if p.is_shard() else Replicate() for p in weight.placements]
        parts = DTensor.from_local(rows, weight.device_mesh, placements, shape=shape, stride=(shape[1], 1))
        return parts.full_tensor()

    def here(self, whole: Tensor) -> Tensor:
        """Inverse of `whole`."""
        if not self._sharded():
            return whole
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        weight: Any = self.weight
        placements = [Shard(0) if p.is_shard() else Replicate() for p in weight.placements]
        return distribute_tensor(whole, weight.device_mesh, placements).to_local()

    def _sharded(self) -> bool:
        return any(p.is_shard() for p in getattr(self.weight, "placements", ()))

    def _shape(self) -> torch.Size:
        like = torch.empty(self.weight.shape, device="meta")
        return (like if self.view is None else self.view(like)).shape
