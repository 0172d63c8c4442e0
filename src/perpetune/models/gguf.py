"""Models in a GGUF file, with their tokenizer."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..core.errors import ModelError
from .precision import Loading


def located(name: str | Path, loading: Loading) -> tuple[str, str | None]:
    """Where a model is loaded from, and the GGUF file in it, if it is one.

    Raises:
        ModelError: no such file.
    """
    path = Path(name)
    if path.suffix != ".gguf":
        return str(name), loading.gguf_file
    if not path.is_file():
        raise ModelError(f"there is no file {path}: give a GGUF file, a hub id, or a folder (--model)")
    return str(path.parent), path.name


@contextlib.contextmanager
def parsed_once() -> Iterator[None]:
    """Within it, a GGUF file is parsed once: transformers does so for the configuration, the weights and the tokenizer,
    and takes seconds for a vocabulary each time; and makes the table of tensor names anew for every module. What is
    parsed are plain bytes: every slice of a `memmap` makes another one, and of those there are millions."""
    try:
        package = importlib.import_module("gguf")
    except ImportError:  # transformers says what to install
        yield
        return
    theirs = {name: getattr(package, name) for name in ("GGUFReader", "get_tensor_name_map")}
    data = property(lambda self: self._bytes, lambda self, found: setattr(self, "_bytes", np.asarray(found)))
    reader = type("Reader", (theirs["GGUFReader"],), {"data": data})
    for name, made in {**theirs, "GGUFReader": reader}.items():
        setattr(package, name, functools.cache(made))
    try:
        yield
    finally:
        for name, made in theirs.items():
            setattr(package, name, made)


def load_gguf(auto: Any, source: str, file: str, loading: Loading) -> tuple[Any, dict[str, Any]]:
    """The model of a GGUF file, and which of its weights were not stored.

    transformers dequantises it, and leaves a model that says that it is quantised, and that it cannot save: the weights
    are put into a new model of the class instead. The precision is fp32, unless another was asked for.
    """
    given = loading.arguments(torch.float32)
    later = {name: given.pop(name) for name in ("quantization_config", "device_map") if name in given}
    read, info = auto.from_pretrained(source, gguf_file=file, output_loading_info=True, **given)
    config = copy.deepcopy(read.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    weights = read.state_dict()
    if later:  # quantised once more, or dealt to devices, as from_pretrained does it
        model = type(read).from_pretrained(None, config=config, state_dict=weights, **given, **later)
        return model, info
    with torch.device("meta"):
        model = type(read)(config)
    model.load_state_dict(weights, assign=True, strict=False)
    _take_buffers(model, read)
    model.tie_weights()
    if read.generation_config is not None:
        model.generation_config = read.generation_config
    return model.to(dtype=read.dtype).eval(), info


def _take_buffers(model: torch.nn.Module, read: torch.nn.Module) -> None:
    """Buffers that are no part of the state (frequencies of rotary positions) are those that were read."""
    theirs = dict(read.named_modules())
    for name, module in model.named_modules():
        for key, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, key, dict(theirs[name].named_buffers(recurse=False))[key])
