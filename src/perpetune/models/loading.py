"""Pre-trained models from the Hub or from a folder, with what reads their inputs."""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..core.errors import ConfigError, ModelError
from ..streams.task import Modality
from .backbone import Backbone
from .classifier import classifier_labels, load_classifier
from .dual_encoder import DualBackbone, is_dual
from .in_memory import InMemory
from .language_loading import load_language_model, quiet, said
from .pooling import Pooling
from .precision import Loading
from .tokenizer_check import check_room, check_vocabulary, embedding_rows, longest_text, settle_padding


def load_model(source: str | Path | InMemory, modality: Modality, loading: Loading) -> Backbone:
    """The model that reads a stream: a language model for prompts, else an encoder.

    Args:
        source: hub id, folder, GGUF file, or a model in memory.

    Raises:
        ConfigError: pooling for a language model.
        ModelError: it cannot be loaded, or does not read this modality.
    """
    if modality != "language":
        return _load_encoder(source, modality, loading)
    if loading.pooling is not None:
        raise ConfigError("a language model answers prompts, and pools nothing: leave pooling out")
    return load_language_model(source, loading)


def load_backbone(name: str | Path, modality: Literal["text", "image"], **options: Any) -> Backbone:
    """Load any transformers encoder by hub id or local folder; for images a dual encoder, too (see `DualBackbone`).

    Args:
        name: hub id or folder that `AutoModel` loads.
        modality: what the stream holds; decides between tokenizer and image processor.
        options: see `Loading`: pooling, max_length, trust_remote_code, dtype, ...

    Raises:
        ModelError: it cannot be loaded, or does not read this modality.
    """
    return _load_encoder(name, modality, Loading(**options))


def _load_encoder(source: str | Path | InMemory, modality: Literal["text", "image"], loading: Loading) -> Backbone:
    pooling, max_length, trust = loading.pooling, loading.max_length, loading.trust_remote_code
    path = None if isinstance(source, InMemory) else str(source)
    if isinstance(source, InMemory):
        name, lacking = source.name, frozenset[str]()
        model, processor = source.taken(loading)
    else:
        name = str(source)
        model, processor, missing = _read_encoder(name, modality, loading)
        lacking = frozenset(missing)
    config = model.config
    if is_dual(model):
        if modality == "text":
            raise ModelError(
                f"`{name}` ({config.model_type}) reads images and texts into one space: give it a stream of images "
                "with labels or captions, and a text encoder for this one"
            )
        if path is None:
            raise ModelError(f"`{name}` is a dual encoder, which needs a tokenizer beside: give its folder")
        return load_dual(model, processor, path, max_length, pooling=pooling, trust_remote_code=trust)
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
        check_vocabulary(processor, embedding_rows(model), name)
        check_room(processor, max_length, name)
    backbone = Backbone(
        model,
        processor,
        modality=modality,
        pooling=pooling or choose_pooling(path, model, modality),
        max_length=max_length or 0,
        name=name,
    )
    if modality == "text":
        settle_padding(backbone)
    backbone.left_out = classifier_labels(config)
    backbone.classifier = None if path is None else partial(load_classifier, backbone, path, trust)
    return backbone


def _read_encoder(source: str, modality: str, loading: Loading) -> tuple[Any, Any, Collection[str]]:
    """Model, processor, and which weights were not stored.

    Raises:
        ModelError: one of them cannot be loaded.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

    trust = loading.trust_remote_code
    auto = AutoTokenizer if modality == "text" else AutoImageProcessor
    try:
        with quiet():
            config = AutoConfig.from_pretrained(source, trust_remote_code=trust)
            model, lacking = _load_model(_encoder(config, source), source, config, loading)
            return model, auto.from_pretrained(source, trust_remote_code=trust), lacking
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        kind = "tokenizer" if modality == "text" else "image processor"
        raise ModelError(
            f"cannot load `{source}` as a transformers model with a {kind} ({said(error, source)}): give a hub id or a "
            "folder with config.json, weights and the processor's files"
        ) from error


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


def choose_pooling(source: str | None, model: nn.Module, modality: str) -> Pooling:
    """What the model was trained with, where it says so; else what its architecture suggests."""
    from transformers.utils import cached_file

    missing = {
        f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "gated_repo", "connection_errors")
    }
    # as sentence-transformers writes it
    saved = None if source is None else cached_file(source, "config.json", subfolder="1_Pooling", **missing)
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


def _load_model(auto: Any, source: str, config: Any, loading: Loading) -> tuple[nn.Module, Collection[str]]:
    """The model, and which of its weights were not stored."""
    kwargs: dict[str, Any] = {"config": config, "output_loading_info": True, **loading.arguments(torch.float32)}
    if loading.pooling != "pooler":
        # an unused pooler is often randomly initialised, gets no gradient, and is hit by `all-linear`
        try:
            model, info = auto.from_pretrained(source, add_pooling_layer=False, **kwargs)
            return model, info["missing_keys"]
        except TypeError:
            pass  # this architecture has no such switch, so it is loaded as it is
    model, info = auto.from_pretrained(source, **kwargs)
    return model, info["missing_keys"]
