"""Whether a model and its tokenizer belong together: positions, token ids, and what padding does to features."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..core.errors import ConfigError, ModelError, first_line
from ..core.tensors import relative_change

if TYPE_CHECKING:
    from .backbone import Backbone
    from .language_model import LanguageBackbone

ROUNDING = 1e-3  # far above that of fp32 (1e-6), far below what a position or a read padding token changes (0.01 to 1)


def first_position(model: nn.Module) -> int:
    """The position of a text's first token: 0, or padding_idx + 1 where positions start behind the padding index
    (fairseq's way: RoBERTa, XLM-R, MPNet and their like)."""
    return max((padding + 1 for _, padding in _padded_positions(model)), default=0)


def longest_text(model: Any, config: Any) -> int | None:
    """How many tokens a model has positions for, where its configuration or its embeddings say so."""
    said = getattr(config, "max_position_embeddings", None)
    limits = [said] if isinstance(said, int) and said > 0 else []
    return min([*limits, *(rows - padding - 1 for rows, padding in _padded_positions(model))], default=None)


def _padded_positions(model: nn.Module) -> list[tuple[int, int]]:
    """(rows, padding_idx) of position embeddings that start behind a padding index."""
    return [
        (len(module.weight), int(module.padding_idx))
        for name, module in model.named_modules()
        if "position" in name.rpartition(".")[2]
        and getattr(module, "padding_idx", None) is not None
        and getattr(module, "weight", None) is not None
    ]


def embedding_rows(model: Any) -> int | None:
    """How many tokens a model has embeddings for; None where it does not say."""
    try:
        return len(model.get_input_embeddings().weight)
    except (AttributeError, NotImplementedError, TypeError):
        return None  # an image model, or a model of somebody's own


def check_vocabulary(tokenizer: Any, rows: int | None, name: str) -> None:
    """Make the padding token one that the model has an embedding for; what stands there is masked.

    Args:
        rows: see `embedding_rows`.

    Raises:
        ModelError: the tokenizer's own vocabulary, added tokens aside, is larger than the model's embedding; it knows
            special tokens alone, as one that is made where its files are missing.
    """
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise ModelError(
            f"the tokenizer of `{name}` knows no word, only {', '.join(tokenizer.all_special_tokens)}: put the "
            "tokenizer's files (tokenizer.json, or vocab.txt and the like) beside config.json"
        )
    if rows is not None and tokenizer.vocab_size > rows:
        raise ModelError(
            f"the tokenizer of `{name}` knows {tokenizer.vocab_size} tokens, and the model has embeddings for {rows}: "
            "put the tokenizer that the model was trained with into its folder"
        )
    if tokenizer.pad_token_id is None or not _within(tokenizer.pad_token_id, rows):
        token = spare_token(tokenizer, rows)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(token)


def check_room(tokenizer: Any, max_length: int, name: str) -> None:
    """
    Raises:
        ConfigError: texts cut to `max_length` tokens hold none of their own.
    """
    added = tokenizer.num_special_tokens_to_add()
    if max_length <= added:
        raise ConfigError(
            f"max_length {max_length} leaves no room for a text: the tokenizer of `{name}` adds {added} tokens to "
            f"each; set it to at least {added + 1}"
        )


def spare_token(tokenizer: Any, rows: int | None) -> int:
    """A token without content of its own that the model has an embedding for: stands for padding, or for no text."""
    named = (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id)
    return next((token for token in named if token is not None and _within(token, rows)), 0)


def check_ids(tokenizer: Any, ids: list[int], rows: int | None, name: str) -> None:
    """
    Raises:
        ModelError: a token that the model has no embedding for.
    """
    worst = max(ids, default=0)
    if not _within(worst, rows):
        raise ModelError(
            f"`{tokenizer.convert_ids_to_tokens(worst)}` is token {worst}, and `{name}` has embeddings for {rows} "
            "alone: take the added token out of the tokenizer or of the texts, or save the model again after "
            f"model.resize_token_embeddings({worst + 1}) and training"
        )


def _within(token: int, rows: int | None) -> bool:
    return rows is None or token < rows


def settle_padding(backbone: Backbone) -> None:
    """Read a short text alone and beside a longer one: features must agree to rounding. A model that reads its padding
    (FNet mixes all places, ConvBERT's windows reach over the end) is given texts of one length, all padded alike.

    Raises:
        ModelError: the model cannot read a text, gives what is not finite, or answers by what else is in the batch.
    """
    training = backbone.model.training
    for backbone.pads_all in (False, True):
        try:
            examples = backbone.samples()
            alone, together = (backbone.features(examples, size) for size in (1, 2))
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
            raise ModelError(
                f"`{backbone.name}` cannot read a text as an encoder does ({first_line(error)}): give an encoder, or, "
                "for a language model, pose the texts as instructions (--pose instruction)"
            ) from error
        finally:
            backbone.model.train(training)  # as it was loaded
        if not bool(together.isfinite().all()):
            raise ModelError(f"the features of `{backbone.name}` are not finite: its weights are damaged, or not fp32")
        if relative_change(together, alone) < ROUNDING:
            return
    raise ModelError(
        f"the features that `{backbone.name}` gives of a text change with what else is read beside it: give another "
        "encoder"
    )


@torch.inference_mode()
def check_causal(backbone: LanguageBackbone) -> None:
    """
    Raises:
        ModelError: what a decoder says after a token depends on those that follow.
    """
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 10]]) % (embedding_rows(backbone.model) or 11)
    logits = backbone.model(input_ids=ids.to(backbone.model.device), use_cache=False).logits[:, 1].float()
    if relative_change(logits[1], logits[0]) > ROUNDING:
        raise ModelError(
            f"`{backbone.name}` sees what follows a token when it should foretell it, and so it is no language model: "
            "give a decoder, or a stream of `text` and `label` for an encoder"
        )
