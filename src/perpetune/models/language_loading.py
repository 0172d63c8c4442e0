"""Language models from the Hub, a folder, a GGUF file or memory, with what reads their prompts."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from ..core.errors import ModelError, first_line
from .gguf import load_gguf, located, parsed_once
from .in_memory import InMemory
from .language_model import LanguageBackbone
from .precision import Loading
from .tokenizer_check import check_causal, check_vocabulary, embedding_rows, longest_text
from .vision_language_model import PicturedBackbone, reads_images


def load_language_model(
    source: str | Path | InMemory, loading: Loading | None = None, **options: Any
) -> LanguageBackbone:
    """Load any transformers language model: `AutoModelForSeq2SeqLM` where its configuration says that it is an encoder
    and a decoder, `AutoModelForImageTextToText` where it reads images, else `AutoModelForCausalLM`.

    Args:
        source: hub id, folder, GGUF file, or a model in memory.
        loading: how; options: its fields, in its place.

    Raises:
        ModelError: it cannot be loaded, or its weights have no language modelling head.
    """
    loading = loading or Loading(**options)
    missing: Collection[str] = ()
    if isinstance(source, InMemory):
        name = source.name
        model, processor = source.taken(loading)
    else:
        name = str(source)
        model, processor, missing = _read(name, loading)
    config = model.config
    if missing or model.get_output_embeddings() is None:
        lacking = sorted(missing)[0] if missing else "a language modelling head"
        raise ModelError(
            f"the weights of `{name}` lack {lacking}, and so it is no trained language model: "
            "give one with a language modelling head, or a stream of `text` and `label` for an encoder"
        )
    reader = getattr(config, "encoder", config)  # a model made of an encoder and a decoder has a configuration for each
    part = model.get_encoder() if config.is_encoder_decoder else model
    limit = longest_text(part, reader.get_text_config())
    longest = min(loading.max_length or 512, limit or loading.max_length or 512)
    check_vocabulary(getattr(processor, "tokenizer", processor), embedding_rows(model), name)
    kind = PicturedBackbone if reads_images(config) else LanguageBackbone
    backbone = kind(model, processor, max_length=longest, name=name)
    if kind is LanguageBackbone and backbone.start is None:
        check_causal(backbone)
    return backbone


def _read(name: str, loading: Loading) -> tuple[Any, Any, Collection[str]]:
    """Model, tokenizer or processor, and which weights were not stored.

    Raises:
        ModelError: one of them cannot be loaded.
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

    source, file = located(name, loading)
    own: dict[str, Any] = {"trust_remote_code": loading.trust_remote_code}
    try:
        with quiet():
            if file is not None:
                with parsed_once():
                    model, info = load_gguf(AutoModelForCausalLM, source, file, loading)
                    return model, AutoTokenizer.from_pretrained(source, gguf_file=file, **own), info["missing_keys"]
            config = AutoConfig.from_pretrained(source, **own)
            pictures = reads_images(config)
            decoder: Any = AutoModelForImageTextToText if pictures else AutoModelForCausalLM
            auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else decoder
            given = loading.arguments("auto")
            model, info = auto.from_pretrained(source, config=config, output_loading_info=True, **given)
            reads: Any = AutoProcessor if pictures else AutoTokenizer
            return model, reads.from_pretrained(source, **own), info["missing_keys"]
    except (
        OSError,
        ValueError,
        KeyError,
        ImportError,
        AttributeError,
        TypeError,
        RuntimeError,
        SafetensorError,
    ) as error:
        raise ModelError(
            f"cannot load `{name}` as a language model with a tokenizer ({said(error, name)}): give a hub id or a "
            "folder with config.json, weights and the files of the tokenizer, or of the processor where it reads "
            "images (one that reads videos, too, as Qwen2-VL's, needs the package torchvision)"
        ) from error


def said(error: Exception, source: object) -> str:
    """What an error of loading says, or that a path leads nowhere, where transformers speaks of names on the Hub."""
    name = str(source)
    is_path = name.startswith(("/", "~", ".")) or "\\" in name or name.count("/") > 1
    return "there is no such file or folder" if is_path and not Path(name).exists() else first_line(error)


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
