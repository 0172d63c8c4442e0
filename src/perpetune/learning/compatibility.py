"""Which heads a model can be read with, and what stands in for those that a recipe did not choose."""

from __future__ import annotations

from ..core.errors import ConfigError
from ..heads import ContrastiveHead, LanguageHead, LinearHead
from ..models.backbone import Backbone
from ..recipes.recipe import Recipe


def suited(recipe: Recipe, backbone: Backbone, given: bool, captions: bool = False) -> Recipe:
    """The recipe, with the heads of its kind of model in place of its own.

    Language models are read by language heads, and nothing else is. Dual encoders are read by the contrastive head
    where a recipe has no more than a linear one.

    Args:
        given: whether the heads were asked for, so that none takes their place.
        captions: whether label texts are captions, of which the training data lacks those of the test data.

    Raises:
        ConfigError: heads that were asked for read something else, or what the model is tuned with does.
    """
    speaks, dual = "answers" in backbone.offers, "pairs" in backbone.offers
    states, keeper = recipe.consolidation.states, type(recipe.consolidation).__name__
    routed = states is not None
    blocks = states is not None and states.blocks
    unfit = [head.name for head in recipe.heads if head.blocks != blocks]
    if unfit and blocks:
        raise ConfigError(
            f"{keeper} puts the features under all adapters side by side, and head `{unfit[0]}` reads one: use the "
            "head ease, or the consolidation PerTask"
        )
    if unfit:
        raise ConfigError(
            f"head `{unfit[0]}` reads the features under an adapter for every task, and {keeper} keeps no such: use "
            "the recipe ease, or another head"
        )
    trained = [head.name for head in recipe.heads if head.trains]
    if states is not None and states.read_width(1) > 1 and trained:
        raise ConfigError(
            f"{keeper} puts features side by side for heads that gather, and `{trained[0]}` is trained: use ncm, lda "
            "or ridge"
        )
    strange = [head for head in recipe.heads if (head.reads == "answers") != speaks]
    if strange and not speaks:
        raise ConfigError(
            f"head `{strange[0].name}` reads the answers of a language model: use a stream of prompts (or "
            'pose="instruction"), or another head'
        )
    if strange and (given or not (recipe.tuner.trains or strange[0].trains)):
        raise ConfigError(
            f"head `{strange[0].name}` reads pooled features, and prompts are answered by a language model: use "
            "the heads language or language_generated"
        )
    if strange:
        return recipe.with_heads([LanguageHead()])
    follows = any(head.reads == "pairs" for head in recipe.heads)
    if follows and not dual:
        raise ConfigError(
            f"head `contrastive` trains a text tower beside an image tower, and `{backbone.name}` is no dual encoder: "
            "use linear, or label_text for text encoders"
        )
    if follows and routed:
        raise ConfigError(
            f"{keeper} keeps a state of the model for every task, and the contrastive head reads the label texts under "
            "one: use label_text, linear, ncm or ridge"
        )
    own = [type(head) for head in recipe.heads] == [LinearHead]
    if dual and own and not (given or routed):
        return recipe.with_heads([ContrastiveHead()])
    classes = [head.name for head in recipe.heads if not (head.follows_texts or head.needs_label_embeddings)]
    if captions and classes:
        raise ConfigError(
            f"head `{classes[0]}` knows the classes that it was trained with, and each image has a caption of its own: "
            "use the head contrastive, and a dual encoder (CLIP, SigLIP)"
        )
    return recipe
