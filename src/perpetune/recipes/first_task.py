"""Adaptation to the first task, and statistics from then on."""

from __future__ import annotations

from typing import Any, Literal

from ..consolidation import FirstTask
from ..heads import PrototypeHead, RidgeHead
from .projection import ADAPTER_TRAINING
from .recipe import Recipe

Kept = Literal["always", "better"]


def ranpac(bottleneck: int = 64, features: int = 1024, keep: Kept = "always") -> Recipe:
    """RanPAC in full: an adapter tuned on the first task, then ridge on random features.

    McDonnell et al., RanPAC: Random Projections and Pre-trained Models for Continual Learning, 2307.02251. Published:
    adapters of 64 units parallel to the feed-forward network (AdaptFormer; SSF or VPT on some streams), 20 epochs of
    SGD, 10,000 random features, a strength chosen from the latest task alone (here from a hold-out over all).
    """
    return Recipe(_adapter(bottleneck), [], FirstTask(keep), RidgeHead(features), training=ADAPTER_TRAINING)


def aper(bottleneck: int = 64, keep: Kept = "always") -> Recipe:
    """APER: an adapter tuned on the first task; class means of features without and with it, side by side.

    Zhou et al., Revisiting Class-Incremental Learning with Pre-Trained Models, 2303.07338 (its form with adapters;
    ADAM in its first version). Published: 64 units, 20 epochs of SGD with a cosine classifier, here our defaults.
    """
    return Recipe(_adapter(bottleneck), [], FirstTask(keep, True), PrototypeHead(), training=ADAPTER_TRAINING)


def _adapter(bottleneck: int) -> Any:
    from ..tuners.adapter import AdapterConfig

    return AdapterConfig(bottleneck=bottleneck, form="parallel", activation="relu")
