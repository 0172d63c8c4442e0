"""Pre-trained models from the Hub or from a folder, with what reads their inputs."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..core.errors import ConfigError, ModelError, first_line
from ..streams.task import Modality
from .backbone import Backbone, Pooling
from .classifier import classifier_labels, load_classifier
from .dual_encoder import DualBackbone, is_dual
from .language_model import LanguageBackbone
from .tokenizer_check import check_causal, check_room, check_vocabulary, embedding_rows, longest_text, settle_padding
from .vision_language_model import PicturedBackbone, reads_images


def load_model(
    name: str | Path,
    modality: Modality,
    *,
    pooling: Pooling | None = None,
    max_length: int | None = None,
    trust_remote_code: bool = False,
) -> Backbone:
    """The model that reads a stream: a language model for prompts, else an encoder. Arguments as `load_backbone`.

    Raises:
        ConfigError: pooling for a language model.
        ModelError: it cannot be loaded, or does not read this modality.
    """
    if modality != "language":
        options: Any = {"max_length": max_length, "trust_remote_code": trust_remote_code}
        return load_backbone(name, modality, pooling=pooling, **options)
    if pooling is not None:
        raise ConfigError("a language model answers prompts, and pools nothing: leave pooling out")
    return load_language_model(name, max_length=max_length, trust_remote_code=trust_remote_code)


def load_backbone(
    name: str | Path,
    modality: Literal["text", "image"],
    *,
    pooling: Pooling | None = None,
    max_length: int | None = None,
    trust_remote_code: bool = False,
) -> Backbone:
    """Load any transformers encoder by hub id or local folder; for images a dual encoder, too (see `DualBackbone`).

    Args:
        name: hub id or folder that `AutoModel` loads.
        modality: what the stream holds; decides between tokenizer and image processor.
        pooling: "mean" over tokens that are not padding, "cls", "last" or "pooler"; None chooses from the architecture.
        max_length: longest text in tokens; None takes the model's own limit, at most 256.

    Raises:
        ModelError: it cannot be loaded, or does not read this modality.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

    source, trust = str(name), trust_remote_code
    auto = AutoTokenizer if modality == "text" else AutoImageProcessor
    try:
        with quiet():
            config = AutoConfig.from_pretrained(source, trust_remote_code=trust)
            model, lacking = _load_model(_encoder(config, source), source, config, pooling, trust)
            processor = auto.from_pretrained(source, trust_remote_code=trust)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        kind = "tokenizer" if modality == "text" else "image processor"
        raise ModelError(
            f"cannot load `{name}` as a transformers model with a {kind} ({first_line(error)}): give a hub id or a "
            "folder with config.json, weights and the processor's files"
        ) from error
    if is_dual(model):
        if modality == "text":
            raise ModelError(
                f"`{name}` ({config.model_type}) reads images and texts into one space: give it a stream of images "
                "with labels or captions, and a text encoder for this one"
            )
        return load_dual(model, processor, source, max_length, pooling=pooling, trust_remote_code=trust)
    if not hasattr(config, "hidden_size"):
        raise ModelError(f"`{name}` ({config.model_type}) has no single hidden size: it is not a plain encoder")
    if pooling == "pooler" and any("pooler" in key for key in lacking):
        raise ModelError(
            f"the weights of `{name}` hold no pooler, and one with random weights would say little: choose pooling "
            "mean, cls or last"
        )
    if modality == "text":
        limit = min(getattr(processor, "model_max_length", 256), longest_text(model, config) or 256)
        max_length = min(max_length or 256, limit)
        check_vocabulary(processor, embedding_rows(model), str(name))
        check_room(processor, max_length, str(name))
    backbone = Backbone(
        model,
        processor,
        modality=modality,
        pooling=pooling or choose_pooling(source, model, modality),
        max_length=max_length or 0,
        name=str(name),
    )
    if modality == "text":
        settle_padding(backbone)
    backbone.left_out = classifier_labels(config)
    backbone.classifier = partial(load_classifier, backbone, source, trust)
    return backbone


def _encoder(config: Any, source: str) -> Any:
    """The class that loads what reads inputs: of T5 and its like the encoder alone.

    Raises:
        ModelError: an encoder-decoder model whose encoder transformers does not load by itself.
    """
    from transformers import AutoModel, AutoModelForTextEncoding
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING

    known: Any = MODEL_FOR_TEXT_ENCODING_MAPPING
    if type(config) in known and known[type(config)].__name__.endswith("EncoderModel"):
        return AutoModelForTextEncoding
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"`{source}` ({config.model_type}) is an encoder and a decoder, which answer prompts together: pose the "
            "texts as instructions (--pose instruction), or give an encoder"
        )
    return AutoModel


def load_dual(
    model: Any, processor: Any, source: str, max_length: int | None, *, pooling: str | None, trust_remote_code: bool
) -> DualBackbone:
    """A dual encoder whose model and image processor are loaded, with its tokenizer; arguments as `load_backbone`.

    Raises:
        ModelError: it has no tokenizer, is to be pooled, or reads images as patches of any number.
    """
    from transformers import AutoTokenizer

    if pooling is not None:
        raise ModelError(f"`{source}` is a dual encoder, and its towers pool for themselves: leave pooling out")
    if "spatial_shapes" in inspect.signature(model.get_image_features).parameters:
        raise ModelError(
            f"`{source}` ({model.config.model_type}) reads images as patches of any number, which are not supported: "
            "give one that was trained on images of one size"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        # without its files, one is made that knows no word
        words = tokenizer(["a", "b"]).input_ids
    except (OSError, ValueError, KeyError, ImportError):
        words = [[], []]
    if words[0] == words[1]:
        raise ModelError(
            f"`{source}` is a dual encoder without a tokenizer: put its files beside config.json, for the label texts "
            "are read with it"
        )
    check_vocabulary(tokenizer, embedding_rows(model), source)
    return DualBackbone(model, processor, tokenizer, max_length=max_length, name=source)


def load_language_model(
    name: str | Path, *, max_length: int | None = None, trust_remote_code: bool = False
) -> LanguageBackbone:
    """Load any transformers language model by hub id or local folder: `AutoModelForSeq2SeqLM` where its configuration
    says that it is an encoder and a decoder, `AutoModelForImageTextToText` where it reads images, else
    `AutoModelForCausalLM`.

    Args:
        name: hub id or folder.
        max_length: longest prompt in tokens; None: 512, or less where the model reads less.

    Raises:
        ModelError: it cannot be loaded, or its weights have no language modelling head.
    """
    from safetensors import SafetensorError
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForSeq2SeqLM,
        AutoProcessor,
        AutoTokenizer,
    )

    source, trust = str(name), trust_remote_code
    try:
        with quiet():
            config = AutoConfig.from_pretrained(source, trust_remote_code=trust)
            pictures = reads_images(config)
            decoder: Any = AutoModelForImageTextToText if pictures else AutoModelForCausalLM
            auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else decoder
            model, info = auto.from_pretrained(
                source, config=config, trust_remote_code=trust, dtype=torch.float32, output_loading_info=True
            )
            reads: Any = AutoProcessor if pictures else AutoTokenizer
            processor = reads.from_pretrained(source, trust_remote_code=trust)
    except (OSError, ValueError, KeyError, ImportError, AttributeError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"cannot load `{name}` as a language model with a tokenizer ({first_line(error)}): give a hub id or a "
            "folder with config.json, weights and the files of the tokenizer, or of the processor where it reads "
            "images (one that reads videos, too, as Qwen2-VL's, needs the package torchvision)"
        ) from error
    if info["missing_keys"]:
        raise ModelError(
            f"the weights of `{name}` lack {sorted(info['missing_keys'])[0]}, and so it is no trained language model: "
            "give one with a language modelling head, or a stream of `text` and `label` for an encoder"
        )
    reader = getattr(config, "encoder", config)  # a model made of an encoder and a decoder has a configuration for each
    part = model.get_encoder() if config.is_encoder_decoder else model
    limit = longest_text(part, reader.get_text_config())
    longest = min(max_length or 512, limit or max_length or 512)
    check_vocabulary(getattr(processor, "tokenizer", processor), embedding_rows(model), str(name))
    kind = PicturedBackbone if pictures else LanguageBackbone
    backbone = kind(model, processor, max_length=longest, name=str(name))
    if kind is LanguageBackbone and backbone.start is None:
        check_causal(backbone)
    return backbone


def choose_pooling(source: str, model: nn.Module, modality: str) -> Pooling:
    """What the model was trained with, where it says so; else what its architecture suggests."""
    from transformers.utils import cached_file

    missing = {
        f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "gated_repo", "connection_errors")
    }
    saved = cached_file(source, "config.json", subfolder="1_Pooling", **missing)  # as sentence-transformers writes it
    if saved is not None:
        modes = json.loads(Path(saved).read_text(encoding="utf-8"))
        chosen: dict[str, Pooling] = {"cls_token": "cls", "lasttoken": "last", "mean_tokens": "mean"}
        for mode, pooling in chosen.items():
            if modes.get(f"pooling_mode_{mode}"):
                return pooling
    if modality == "image":
        names = [name for name, _ in model.named_parameters()]
        return "cls" if any(n.endswith(("cls_token", "class_embedding")) for n in names) else "mean"
    config: Any = model.config
    causal = any("CausalLM" in a for a in getattr(config, "architectures", None) or [])
    return "last" if causal or getattr(config, "is_decoder", False) else "mean"


def _load_model(
    auto: Any, source: str, config: Any, pooling: Pooling | None, trust: bool
) -> tuple[nn.Module, Collection[str]]:
    """The model, and which of its weights were not stored."""
    kwargs: dict[str, Any] = {"config": config, "trust_remote_code": trust, "dtype": torch.float32}
    kwargs["output_loading_info"] = True
    if pooling != "pooler":
        # an unused pooler is often randomly initialised, gets no gradient, and is hit by `all-linear`
        try:
            model, info = auto.from_pretrained(source, add_pooling_layer=False, **kwargs)
            return model, info["missing_keys"]
        except TypeError:
            pass  # this architecture has no such switch, so it is loaded as it is
    model, info = auto.from_pretrained(source, **kwargs)
    return model, info["missing_keys"]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and load reports: perpetune has a display of its own."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
