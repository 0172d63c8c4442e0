"""LoRAs of many tasks merged into one, in a memory that does not grow with them."""

from __future__ import annotations

from ..consolidation import FactorMerge, ProjectedMerge
from ..heads import PrototypeHead
from ..tuners import QUERY_VALUE
from .lora_family import LORA_TRAINING, lora_config
from .recipe import Recipe


def slao(
    rank: int = 8,
    alpha: float | None = None,
    target: str | list[str] = QUERY_VALUE,
    dropout: float = 0.0,
    power: float = 0.5,
) -> Recipe:
    """SLAO: one LoRA; every task goes on from the one before it, and its A replaces, its B moves the merged one.

    Qiao and Mahdavi, Merge before Forget: A Single LoRA Continual Learning via Continual Merging, 2512.23017 (ICLR
    2026). Published for language models, with lambda(t) = 1 / sqrt(t), r = 8 on query and value, learning rate 5e-5
    (ours 5e-4); alpha and dropout are not in what we have of the paper. No code was released. On encoders the linear
    head is trained on the factors of its own task, and then read on the merged ones.
    """
    return Recipe(lora_config(rank, alpha, target, dropout), [], FactorMerge(power), training=LORA_TRAINING)


def opcm(
    rank: int = 8,
    alpha: float | None = None,
    target: str | list[str] = QUERY_VALUE,
    dropout: float = 0.0,
    kept: float = 0.5,
) -> Recipe:
    """OPCM: LoRAs tuned from the base, merged one after another outside of what was merged; the norm stays theirs.

    Tang et al., Merging Models on the Fly Without Retraining: A Sequential Approach to Scalable Continual Model
    Merging, 2501.09522. Published for whole CLIP models and their classifiers from texts, alpha 0.5 (`kept`); here for
    the weights that LoRA touches, as later comparisons use it, and with class means.
    """
    config = lora_config(rank, alpha, target, dropout)
    return Recipe(config, [], ProjectedMerge(kept), PrototypeHead(), training=LORA_TRAINING)
