"""Gradient masks: all weights take part, few of them may move.

Both are methods for a single task: they decide which entries move, and defend none that an earlier task needs. The
masks are chosen once, before the first task, and stay. Where the released codes let weight decay act on masked entries,
which then drift, ours obeys the mask.
"""

from __future__ import annotations

from ..consolidation import Continue
from ..rules import FixedMask, StepMask
from ..tuners import AllWeights
from .recipe import Recipe


def child_tuning_f(keep: float = 0.3, seed: int = 0) -> Recipe:
    """Child-Tuning-F: at every step a fresh random share of the gradient's entries, multiplied by 1/keep.

    Xu et al., Raise a Child in Large Language Model: Towards Effective and Generalizable Fine-tuning, 2109.05687 (EMNLP
    2021). Under AdamW this is plain training with learning rate * sqrt(keep), and nearly all entries move: hence the
    learning rate here, that of `sequential` over sqrt(0.3). Published: 4e-5 on BERT-large, for the form D.
    """
    return Recipe(AllWeights(), [StepMask(keep, "gradient", seed)], Continue(), training={"learning_rate": 2e-4})


def child_tuning_f_update(keep: float = 0.3, seed: int = 0) -> Recipe:
    """The same with the mask on the update, so that only the sampled entries move. Not in the paper."""
    return Recipe(AllWeights(), [StepMask(keep, "update", seed)], Continue(), training={"learning_rate": 2e-4})


def child_tuning_d(keep: float = 0.3) -> Recipe:
    """Child-Tuning-D: only the entries of highest Fisher information for the first task move; embeddings move freely.

    Xu et al., 2109.05687, as in the paper: per-sample gradients, one cut for all tensors. Published: keep 0.3, learning
    rate 4e-5, 3 epochs of batches of 16 on BERT-large.
    """
    rule = FixedMask(keep, "fisher", embeddings="free")
    return Recipe(AllWeights(), [rule], Continue(), training={"learning_rate": 1e-4})


def child_tuning_d_released(keep: float = 0.3) -> Recipe:
    """The same as its code chooses the mask: squares of clipped mini-batch gradients, with dropout.

    Gradients of batches of 16, each tensor's clipped to norm 1 on its own, over the whole training set, with dropout
    on; no factor 1/keep. The code goes by names that contain `layer`, and so leaves the norm next to the embeddings
    and the pooler free as well. Its weight decay of masked entries is left out.
    """
    rule = FixedMask(keep, "fisher", embeddings="free", batch=16, clip="per_tensor", dropout=True)
    return Recipe(AllWeights(), [rule], Continue(), training={"learning_rate": 1e-4})


def sam(keep: float = 0.005) -> Recipe:
    """SAM (second-order approximation method): only the entries of largest gradient before the first task move.

    Fu et al., On the Effectiveness of Parameter-Efficient Fine-Tuning, 2211.15583 (AAAI 2023); not Sharpness-Aware
    Minimisation. As run, the method is of first order: |sum g|, here with one cut for all tensors, as in its theorem.
    Published: keep 0.005, learning rate 1e-4 for 20,000 steps and more on RoBERTa-base; 1e-3 makes Adam's steps on so
    few entries about as long as those of `sequential`.
    """
    rule = FixedMask(keep, "gradient", batch=16)
    return Recipe(AllWeights(), [rule], Continue(), training={"learning_rate": 1e-3})


def sam_released(keep: float = 0.005) -> Recipe:
    """The same as its code chooses the mask: a share of each tensor, gradients clipped to norm 1, with dropout.

    599 batches of 16 (at most one pass over the data here), clipped over all scored weights together (the code counts
    the head's in). The code's weight decay of masked entries, which makes the change dense, is left out.
    """
    rule = FixedMask(keep, "gradient", "per_tensor", examples=599 * 16, batch=16, clip="global", dropout=True)
    return Recipe(AllWeights(), [rule], Continue(), training={"learning_rate": 1e-3})
