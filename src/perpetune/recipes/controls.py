"""What every comparison needs beside it: no defence, no training, all data at once, a few kept examples."""

from __future__ import annotations

from ..consolidation import Continue, Joint, Replay
from ..heads import LabelTextHead, LinearHead, PrototypeHead, RidgeHead
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


def frozen_label_text() -> Recipe:
    """Similarity to the label texts under the frozen encoder: zero-shot, nothing is learned."""
    return Recipe(Frozen(), head=LabelTextHead())


def tfidf_ridge(words: int = 2048) -> Recipe:
    """Ridge on hashed TF-IDF words, no random features between: what can be had for text without any network."""
    return Recipe(NoNetwork(words=words), head=RidgeHead(features=0))


def pixels_ridge(features: int = 1024) -> Recipe:
    """Ridge on random features of grey pixels: what can be had for images without any network."""
    return Recipe(NoNetwork(), head=RidgeHead(features=features))
