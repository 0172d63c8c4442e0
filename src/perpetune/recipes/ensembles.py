"""One adapter for every task, all of them read together."""

from __future__ import annotations

from typing import Any

from ..consolidation import Concatenate, SharedBranch
from ..consolidation.shared_branch import Asked, Start
from ..heads import LDAHead, SubspaceHead
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


def tuna(bottleneck: int = 16, asked: Asked = "together", unsure: float = 0.0, start: Start = "previous") -> Recipe:
    """TUNA: one adapter a task, the one that is surest; and the merge of all, whose prediction is added.

    Wang et al., Integrating Task-Specific and Universal Adapters for Pre-Trained Model-based Class-Incremental
    Learning, 2508.08165 (ICCV 2025). Published: adapters of 16 units parallel to the feed-forward network, SGD; a
    cosine classifier that is trained anew after every task on samples of a Gaussian for each class, here discriminant
    analysis of the same features with one covariance; and a loss of weight 1e-3 that keeps the up-projections of
    tasks apart, which is off in one of the released configurations and is not here.
    """
    return Recipe(_adapter(bottleneck), [], SharedBranch(asked, unsure, start), LDAHead(), training=ADAPTER_TRAINING)


def _adapter(bottleneck: int) -> Any:
    from ..tuners.adapter import AdapterConfig

    return AdapterConfig(bottleneck=bottleneck, form="parallel", activation="relu")
