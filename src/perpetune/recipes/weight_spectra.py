"""Tuning that leaves alone what the weights themselves hold most strongly: their leading singular directions."""

from __future__ import annotations

from ..consolidation import Continue, Merge
from ..rules import WeightProjection
from ..tuners import QUERY_VALUE, AllWeights
from .lora_family import LORA_TRAINING, lora_config
from .recipe import Recipe


def osf(rank: int | float | None = None, least: float = 0.1, target: float = 0.8) -> Recipe:
    """OSF: all weights of linear layers trained outside of their leading singular directions, taken anew each task.

    Nayak et al., Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning, 2504.07097.
    Published: a layer keeps the share least + I (target - least) by its importance I (0.1 and 0.8 here). Its code takes
    one share for all layers, projects the gradients of three factors before AdamW at 1e-5 (ours 1e-4), which does not
    keep the directions, and trains what is no matrix, too. peft's `OSFConfig` projects gradients as well, keeps half
    (`rank=0.5`) and freezes all else. Here the update is projected and all else frozen. Importance may leave whole
    layers frozen: `rank=0.5` is the safer choice.
    """
    return Recipe(AllWeights(), [WeightProjection(rank, least, target)], Continue(), training={"learning_rate": 1e-4})


def oplora(
    rank: int = 8, alpha: float | None = None, target: str | list[str] = QUERY_VALUE, kept: int | float = 16
) -> Recipe:
    """OPLoRA: a fresh LoRA on both sides outside of the `kept` leading singular directions of its weight, merged.

    Xiong and Xie, OPLoRA: Orthogonal Projection LoRA Prevents Catastrophic Forgetting during Parameter-Efficient
    Fine-Tuning, 2510.13003. Published for one task, W + s P_L B A P_R with P_L, P_R in the forward pass; here A and B
    are kept projected, which is the same function at every step, and the directions are those of the weights merged so
    far. `alpha` defaults to 4 * rank (ours).
    """
    rule = WeightProjection(kept, branch="fresh")
    return Recipe(lora_config(rank, alpha, target, 0.0), [rule], Merge(), training=LORA_TRAINING)
