"""What several rooms compute with tensors."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def relative_change(new: Tensor, old: Tensor) -> float:
    """|new - old| / |old|, Frobenius, fp64."""
    return float((new.double() - old.double()).norm() / old.double().norm().clamp(min=1e-300))
