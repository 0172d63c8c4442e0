"""One adapter for every task, all of them read together."""

from __future__ import annotations

from typing import Any

from ..consolidation import Concatenate
from ..heads import SubspaceHead
from .projection import ADAPTER_TRAINING
from .recipe import Recipe


def ease(bottleneck: int = 16, alpha: float = 0.1) -> Recipe:
    """EASE: one adapter a task, prototypes in all their feature spaces, old prototypes completed by similar classes.

    Zhou et al., Expandable Subspace Ensemble for Pre-Trained Model-Based Class-Incremental Learning, 2403.12030.
    Published: adapters of 16 units parallel to the feed-forward network, alpha 0.1, ViT-B/16; trained there by SGD with
    a cosine classifier over the task's classes, here with our defaults and the linear head.
    """
    return Recipe(_adapter(bottleneck), [], Concatenate(), SubspaceHead(alpha), training=ADAPTER_TRAINING)


def ease_released(bottleneck: int = 16, alpha: float = 0.1) -> Recipe:
    """The same with the scores of its released code: alpha / (T - 1), and completion from all later classes."""
    head = SubspaceHead(alpha, released=True)
    return Recipe(_adapter(bottleneck), [], Concatenate(), head, training=ADAPTER_TRAINING)


def _adapter(bottleneck: int) -> Any:
    from ..tuners.adapter import AdapterConfig

    return AdapterConfig(bottleneck=bottleneck, form="parallel", activation="relu")
