"""One adapter for every task, chosen by the input."""

from __future__ import annotations

from typing import Literal

from ..consolidation import PerTask, WeighedPerTask
from ..routers import KMeansRouter, LDARouter, OracleRouter, PooledRouter
from ..tuners import QUERY_VALUE
from .lora_family import LORA_TRAINING, lora_config
from .recipe import Recipe

GAMMA = 0.3  # of a kernel of features of length 1: as of `ClosedFormHead`


def color(
    rank: int = 8,
    alpha: float | None = None,
    target: str | list[str] = QUERY_VALUE,
    dropout: float = 0.0,
    centres: int = 5,
    distance: Literal["l2", "l1"] = "l2",
) -> Recipe:
    """CoLoR: one LoRA a task; an input goes to the task of the nearest of its k-means centres, on frozen features.

    Wistuba et al., Continual Learning with Low Rank Adaptation, 2311.17601. Published: 5 centres; rank and learning
    rate are not in what we have of the paper, nor is the sharing of heads (here one for every task).
    """
    return Recipe(
        lora_config(rank, alpha, target, dropout),
        [],
        PerTask(KMeansRouter(centres, distance)),
        training=LORA_TRAINING,
    )


def color_oracle(
    rank: int = 8, alpha: float | None = None, target: str | list[str] = QUERY_VALUE, dropout: float = 0.0
) -> Recipe:
    """The same with the task of every input given: what CoLoR would be if it routed without an error."""
    config = lora_config(rank, alpha, target, dropout)
    return Recipe(config, [], PerTask(OracleRouter()), training=LORA_TRAINING)


def color_adapted(
    rank: int = 8,
    alpha: float | None = None,
    target: str | list[str] = QUERY_VALUE,
    dropout: float = 0.0,
    centres: int = 5,
) -> Recipe:
    """The same with routing features from the model adapted to the first task, on which the routes then depend."""
    return Recipe(
        lora_config(rank, alpha, target, dropout),
        [],
        PerTask(KMeansRouter(centres), features="first_adapted"),
        training=LORA_TRAINING,
    )


def routed(
    rank: int = 8,
    alpha: float | None = None,
    target: str | list[str] = QUERY_VALUE,
    dropout: float = 0.0,
    candidates: int = 3,
    mass: float = 0.95,
    prior: float = 0.5,
) -> Recipe:
    """One LoRA a task; the posterior of the task times that of the class under the task's adapter, summed. Ours.

    The router's posteriors come from order-free statistics of frozen features (`PooledRouter`), and its opinion on the
    classes of a task counts half.
    """
    return Recipe(
        lora_config(rank, alpha, target, dropout),
        [],
        PerTask(PooledRouter(many_tasks=True, together=True), candidates, mass, prior),
        training=LORA_TRAINING,
    )


def routed_product(
    rank: int = 8,
    alpha: float | None = None,
    target: str | list[str] = QUERY_VALUE,
    dropout: float = 0.0,
    candidates: int = 3,
    mass: float = 0.95,
    frozen: float = 0.5,
) -> Recipe:
    """`routed` times what frozen features say about all classes: a wrong route need not decide. Ours.

    p(c | x) ~ (sum_t p(t | x) p_adapter(c | x, t)) p_frozen(c | x)^frozen; p_frozen is the geometric mean of ridge on
    random features and discriminant analysis, with temperatures from hold-out moments, and both route as well. Where
    all tasks ask the same (new domains) p_frozen does not count; language models are read as under `routed`.
    """
    router = PooledRouter(many_tasks=True, together=True, discriminants=True)
    return Recipe(
        lora_config(rank, alpha, target, dropout),
        [],
        PerTask(router, candidates, mass, prior=0.5, frozen=frozen),
        training=LORA_TRAINING,
    )


def routed_layers(
    rank: int = 8,
    alpha: float | None = None,
    target: str | list[str] = QUERY_VALUE,
    dropout: float = 0.0,
    candidates: int = 3,
    mass: float = 0.95,
    frozen: float = 1.0,
    layers: int = 3,
) -> Recipe:
    """`routed_product` whose router reads the last three layers of the frozen encoder side by side. Ours.

    The middle layers know of tasks and classes what the last one has given up. p(c | x) is as in `routed_product`, with
    the frozen expert at its full weight, as the better one that it is. Where all tasks have the same classes the routed
    adapters decide alone; language models, which are read at their last layer, are read as under `routed`.
    """
    router = PooledRouter(many_tasks=True, together=True, discriminants=True)
    return Recipe(
        lora_config(rank, alpha, target, dropout),
        [],
        PerTask(router, candidates, mass, prior=0.5, frozen=frozen, layers=layers),
        training=LORA_TRAINING,
    )


def default(
    rank: int = 8,
    alpha: float | None = None,
    target: str | list[str] = QUERY_VALUE,
    dropout: float = 0.0,
    candidates: int = 3,
    mass: float = 0.95,
    layers: int = 3,
    features: int = 2048,
    holdout: float = 0.1,
    views: int = 8,
) -> Recipe:
    """The frozen model, and one LoRA a task that counts beside it as much as held-out examples show it helps. Ours.

    The frozen model routes and predicts by the mean of discriminant analysis and ridge (`LDARidgeHead`), on random
    features of its last layers side by side, as held-out data of two streams chose (docs/results/default.md). A share
    of each task's rows is held out of the adapters' training and chooses their weight (`WeighedPerTask`); where they do
    not help, the frozen model predicts alone. Of pictures it reads the mean over the picture itself and `views` more,
    turned, zoomed and moved a little (`read_views`). Where all tasks have the same classes the routed adapters decide;
    language models are read as under `routed`.
    """
    router = LDARouter(features, many_tasks=True, together=True, map="kernel_normalised", gamma=GAMMA, ridge=True)
    return Recipe(
        lora_config(rank, alpha, target, dropout),
        [],
        WeighedPerTask(router, candidates, mass, prior=0.5, layers=layers, holdout=holdout, views=views),
        training=LORA_TRAINING,
    )
