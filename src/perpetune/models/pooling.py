"""One vector for an input, from those of its tokens."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..core.errors import ModelError

Pooling = Literal["mean", "cls", "last", "pooler"]


def pool(output: Any, attention_mask: Tensor | None, pooling: Pooling) -> Tensor:
    """(N x tokens x width) to (N x width)."""
    if pooling == "pooler":
        if getattr(output, "pooler_output", None) is None:
            raise ModelError("this model has no pooler: choose pooling mean, cls or last")
        return output.pooler_output
    return pool_states(output.last_hidden_state, attention_mask, pooling)


def pool_states(hidden: Tensor, attention_mask: Tensor | None, pooling: Pooling) -> Tensor:
    """(N x tokens x width) to (N x width), of any layer; a pooler, which only the last has, reads the first token."""
    if pooling in ("cls", "pooler"):
        return hidden[:, 0]
    if attention_mask is None:
        return hidden.mean(1) if pooling == "mean" else hidden[:, -1]
    if pooling == "mean":
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
    positions = torch.arange(hidden.shape[1], device=hidden.device)
    last = (attention_mask * positions).argmax(1)  # right with padding on either side
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def in_full(features: Tensor, model: Any) -> Tensor:
    """Features of a model of half precision in fp32, in which heads are; others as they are."""
    half = next((p.element_size() < 4 for p in model.parameters() if p.is_floating_point()), False)
    return features.float() if half else features
