"""What every comparison needs beside it: no defence, no training, all data at once, a few kept examples."""

from __future__ import annotations

from ..consolidation import Continue, Joint, Replay
from ..heads import AnaCPHead, ClosedFormHead, LabelTextHead, LDAHead, LinearHead, PrototypeHead, RidgeHead
from ..heads.feature_maps import Kind
from ..tuners import QUERY_VALUE, AllWeights, Frozen, NoNetwork
from .lora_family import LORA_TRAINING, lora_config
from .recipe import Recipe


def sequential() -> Recipe:
    """All weights, one task after another: nothing against forgetting."""
    return Recipe(AllWeights(), [], Continue(), training={"learning_rate": 1e-4})


def joint(rank: int = 8, alpha: float | None = None, target: str | list[str] = QUERY_VALUE) -> Recipe:
    """LoRA on all tasks at once: the upper bound."""
    return Recipe(lora_config(rank, alpha, target, 0.0), [], Joint(), training=LORA_TRAINING)


def replay(
    rank: int = 8, alpha: float | None = None, target: str | list[str] = QUERY_VALUE, per_class: int = 10
) -> Recipe:
    """One LoRA all the way, with a few kept examples of every class mixed in; same number of steps."""
    config = lora_config(rank, alpha, target, 0.0)
    return Recipe(config, [], Replay(per_class), LinearHead(loss="seen"), training=LORA_TRAINING)


def frozen_ncm() -> Recipe:
    """Nearest class mean on frozen features: Zhou et al., SimpleCIL, 2303.07338."""
    return Recipe(Frozen(), head=PrototypeHead())


def frozen_ridge(features: int = 1024) -> Recipe:
    """RanPAC's head on frozen features: McDonnell et al., 2307.02251 (published: 10,000 random features)."""
    return Recipe(Frozen(), head=RidgeHead(features=features))


def frozen_lda(map: Kind = "normalised") -> Recipe:
    """Discriminant analysis of frozen features: what class means leave out is how the features of a class spread."""
    return Recipe(Frozen(), head=LDAHead(map))


def frozen_best(features: int | None = None, memory: float = 256.0, views: int = 8) -> Recipe:
    """The best head of sums on frozen features, chosen on hold-out moments: what needs no training, at its best.

    `frozen_ridge` is one of the heads that it chooses among, with its features at length 1. Of pictures it reads the
    mean over the picture itself and `views` more, turned, zoomed and moved a little (`read_views`).
    """
    return Recipe(Frozen(views=views), head=ClosedFormHead(features=features, memory=memory))


def anacp(features: int = 1024, layers: int = 3, regularisation: float = 100.0) -> Recipe:
    """AnaCP on frozen features: contrastive projection in closed form, Momeni et al., 2511.13880.

    Published: 5,000 random features, after adaptation to the first task, which is left out here.
    """
    return Recipe(Frozen(), head=AnaCPHead(features, layers, regularisation))


def frozen_label_text() -> Recipe:
    """Similarity to the label texts under the frozen encoder: zero-shot, nothing is learned."""
    return Recipe(Frozen(), head=LabelTextHead())


def tfidf_ridge(words: int = 2048) -> Recipe:
    """Ridge on hashed TF-IDF words, no random features between: what can be had for text without any network."""
    return Recipe(NoNetwork(words=words), head=RidgeHead(features=0))


def pixels_ridge(features: int = 1024) -> Recipe:
    """Ridge on random features of grey pixels: what can be had for images without any network."""
    return Recipe(NoNetwork(), head=RidgeHead(features=features))
