"""In which numbers the weights of a model are: which precision was asked for, and which it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import nn

from ..core.errors import ConfigError, ModelError, first_line, nearest
from .pooling import Pooling

Precision = Literal["float32", "bfloat16", "float16"]
FOUR_BIT, EIGHT_BIT = ("nf4", "fp4"), "int8"  # quantisations of bitsandbytes that have a name here
LATER = {"unwritten": None}  # settings that came after runs were made


@dataclass(frozen=True)
class Loading:
    """How the base model is loaded.

    Attributes:
        pooling: "mean" over tokens that are not padding, "cls", "last" or "pooler"; None chooses from the architecture.
        max_length: longest text in tokens; None takes the model's own limit, at most 256 for an encoder and 512 for the
            prompt of a language model.
        trust_remote_code: run the code that a model brings along from the Hub.
        dtype: precision of the weights, in training and evaluation; adapters and heads are fp32 in any case. None:
            fp32 for encoders, the checkpoint's own for language models.
        quantization: "nf4", "fp4", "int8" (bitsandbytes), or the settings of any quantization of transformers:
            `{quant_method: bitsandbytes, load_in_4bit: true, ...}`.
        gguf_file: the GGUF file in the model's folder; not needed where the model is such a file.
        attn_implementation, device_map: see `PreTrainedModel.from_pretrained`.

    Raises:
        ConfigError: an unknown precision or quantization.
    """

    pooling: Pooling | None = None
    max_length: int | None = None
    trust_remote_code: bool = False
    dtype: Precision | None = field(default=None, metadata={"unwritten": "float32"})
    quantization: str | dict[str, Any] | None = field(default=None, metadata=LATER)
    gguf_file: str | None = field(default=None, metadata=LATER)
    attn_implementation: str | None = field(default=None, metadata=LATER)
    device_map: Any = None  # where it is, not what it is: not written

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in get_args(Precision):
            raise ConfigError(f"dtype: there is no `{self.dtype}`: {nearest(str(self.dtype), get_args(Precision))}")
        if isinstance(self.quantization, str) and self.quantization not in (*FOUR_BIT, EIGHT_BIT):
            raise ConfigError(
                f"quantization: there is no `{self.quantization}`: {nearest(self.quantization, (*FOUR_BIT, EIGHT_BIT))}"
                "; others are given as the settings of transformers: {quant_method: NAME, ...}"
            )

    @property
    def torch_dtype(self) -> torch.dtype | None:
        return None if self.dtype is None else getattr(torch, self.dtype)

    def arguments(self, auto: torch.dtype | Literal["auto"]) -> dict[str, Any]:
        """Of `from_pretrained`: what decides the weights.

        Args:
            auto: the precision where none was asked for.
        """
        dtype = self.torch_dtype or auto
        given = {"attn_implementation": self.attn_implementation, "device_map": self.device_map}
        if self.quantization is not None:
            given["quantization_config"] = quantization_config(self.quantization, dtype)
        told = {name: value for name, value in given.items() if value is not None}
        return {"dtype": dtype, "trust_remote_code": self.trust_remote_code, **told}

    def written(self, model: nn.Module) -> dict[str, Any]:
        """What a run writes down of the settings that came later; those of before are left out where they say what was
        so."""
        own = {"dtype": precision(model), "gguf_file": self.gguf_file, "quantization": self.quantization}
        own["attn_implementation"] = self.attn_implementation
        later = {n: f.metadata["unwritten"] for n, f in self.__dataclass_fields__.items() if "unwritten" in f.metadata}
        return {name: own[name] for name, old in later.items() if own[name] != old}

    @classmethod
    def of_run(cls, model: Mapping[str, Any]) -> dict[str, Any]:
        """The settings that a run was made with, from what its run.yaml says of its model."""
        names = [name for name in cls.__dataclass_fields__ if name in model]
        return {"dtype": "float32", **{name: model[name] for name in names}}


def quantization_config(given: str | dict[str, Any], dtype: torch.dtype | Literal["auto"]) -> Any:
    """transformers' own configuration of a quantization.

    Args:
        given: see `Loading`; dtype: what 4-bit weights are multiplied in, bf16 where it is not known yet.

    Raises:
        ConfigError: it is refused, or a package is missing.
    """
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.auto import AutoQuantizationConfig

    try:
        if isinstance(given, dict):
            return AutoQuantizationConfig.from_dict(dict(given))
        if given == EIGHT_BIT:
            return BitsAndBytesConfig(load_in_8bit=True)
        compute = torch.bfloat16 if dtype == "auto" else dtype
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=given, bnb_4bit_compute_dtype=compute)
    except (ImportError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"quantization: {first_line(error)}") from error


def precision(model: Any) -> str:
    """The lowest precision of the floating-point weights of a model: float32, bfloat16, float16 ..."""
    found = {p.dtype for p in model.parameters() if p.is_floating_point()} or {torch.float32}
    return str(min(found, key=lambda dtype: (torch.finfo(dtype).bits, str(dtype)))).removeprefix("torch.")


def quantised(model: Any) -> bool:
    """Whether weights are kept as whole numbers, so that nothing can be added to them."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    return bool(getattr(base, "is_quantized", False))


def reduced(model: Any) -> bool:
    """Whether weights are in less than fp32, so that what is added to them is rounded, or cannot be added at all."""
    return quantised(model) or precision(model) not in ("float32", "float64")


def dequantised(model: Any) -> Any:
    """The model with weights in floating point, in place.

    Raises:
        ModelError: its quantization does not say how.
    """
    if not quantised(model):
        return model
    try:
        return model.dequantize()
    except (NotImplementedError, AttributeError, ValueError, TypeError, ImportError) as error:
        raise ModelError(
            f"the weights of {type(model).__name__} are quantised and cannot be dequantised ({first_line(error)}): "
            "merge its adapters into the model that it was made from, with peft"
        ) from error


def check_base(keeps: bool, quantized: bool, half: str | None, recipe: str) -> None:
    """Refuse a recipe that changes the weights of a base in which changes would be lost.

    Args:
        keeps: whether the recipe leaves them as they are (`Consolidation.keeps_base`); half: the precision that was
            asked for or found, None for fp32.

    Raises:
        ConfigError: it changes them.
    """
    if keeps or not (quantized or half):
        return
    what = "a quantised base" if quantized else f"a base in {half}"
    mend = "leave quantization out" if quantized else "set dtype to float32 (and --set bf16=true to compute in bf16)"
    raise ConfigError(
        f"recipe `{recipe}` changes the weights themselves, and on {what} small changes are lost: use one that keeps "
        f"adapters beside it (lora, olora, color), or {mend}"
    )
