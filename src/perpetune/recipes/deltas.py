"""Deltas of tasks combined on the base: every task is tuned on its own, from the base."""

from __future__ import annotations

from typing import Literal

from ..consolidation import DeltaMerge
from ..deltas.combination import ElectSign, Sum
from ..deltas.keep import Everything, RandomMask, TopMagnitude
from ..heads import PrototypeHead
from ..tuners import AllWeights
from .recipe import Recipe

DELTA_TRAINING = {"learning_rate": 1e-4}


def sotu(
    keep: float = 0.1,
    storage: Literal["fp32", "bf16", "int8"] = "fp32",
    sequential: bool = False,
    scale: float | Literal["1/keep", "1/T"] = 1.0,
) -> Recipe:
    """SoTU: a random share of every task's delta, summed as it is.

    Sparse orthogonal parameters tuning, 2411.02813 (no code published; masks after tuning, from the base, no rescaling,
    class means: our reading). `soup` is its expectation at keep = 1/T. Another scale is chosen on validation data:
    `perpetune tune-scale`.
    """
    return Recipe(
        AllWeights(),
        [],
        DeltaMerge(RandomMask(keep), Sum(), scale, sequential, storage),
        PrototypeHead(),
        training=DELTA_TRAINING,
    )


def sotu_disjoint(keep: float = 0.1) -> Recipe:
    """SoTU with masks that never meet, for up to 1/keep tasks."""
    return Recipe(
        AllWeights(), [], DeltaMerge(RandomMask(keep, "disjoint"), Sum()), PrototypeHead(), training=DELTA_TRAINING
    )


def soup() -> Recipe:
    """The average of all tuned models: theta_0 + (1/T) sum d_t, dense (model soups, Wortsman et al., 2203.05482)."""
    return Recipe(
        AllWeights(), [], DeltaMerge(Everything(), Sum(), scale="1/T"), PrototypeHead(), training=DELTA_TRAINING
    )


def task_arithmetic(scale: float = 0.3) -> Recipe:
    """theta_0 + scale * sum d_t, dense: Ilharco et al., Editing models with task arithmetic, 2212.04089.

    Published scales lie about 0.3 to 0.5 and are chosen on validation data: `perpetune tune-scale`.
    """
    return Recipe(AllWeights(), [], DeltaMerge(Everything(), Sum(), scale), PrototypeHead(), training=DELTA_TRAINING)


def ties(keep: float = 0.2, scale: float = 1.0, storage: Literal["fp32", "bf16", "int8"] = "fp32") -> Recipe:
    """TIES: of every task's delta the entries that changed most; where tasks disagree in sign, the heavier sign wins.

    Yadav et al., Resolving Interference When Merging Models, 2306.01708 (NeurIPS 2023). Published without validation
    data: the top 20 % over all parameters of a task and scale (lambda) 1; with it, scales from 0.8 to 2.5 are tried:
    `perpetune tune-scale`. The released code keeps one entry more, and gives entries whose signs weigh the same the
    sign that most entries of the model have; here they stay as they are in the base, as the paper's equation says.
    """
    return Recipe(
        AllWeights(),
        [],
        DeltaMerge(TopMagnitude(keep), ElectSign(), scale, storage=storage),
        PrototypeHead(),
        training=DELTA_TRAINING,
    )
