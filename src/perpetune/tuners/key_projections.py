"""Where the self-attentions of a transformers model project their keys, and how many heads they have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..core.errors import ModelError
from ..models.towers import decoder_name
from .targets import ends_with

# Names of key projections, and of the value projections beside them; in `c_attn`, GPT-2's, both are one.
VALUE_OF = {"key": "value", "k_proj": "v_proj", "k_lin": "v_lin", "k": "v", "c_attn": "c_attn"}
HEAD_DIM = ("head_dim", "attention_head_size", "key_value_proj_dim")
CROSS_ATTENTIONS = {"crossattention", "cross_attention", "cross_attn", "encoder_attn", "EncDecAttention"}
KEY_NORMS = ("k_norm", "qk_norm", "k_layernorm", "k_layer_norm", "key_layernorm", "qk_layernorm", "v_norm")


@dataclass(frozen=True)
class Heads:
    """The heads of an attention.

    Attributes:
        config: of the model; names its attention function.
        width: H_kv head_dim, of keys and of values.
        head_dim: of one head.
        groups: H / H_kv, query heads that share a key.
        value: name of the value projection beside the key projection.
        normed: keys or values are normalised after their projection.
    """

    config: Any
    width: int
    head_dim: int
    groups: int
    value: str
    normed: bool

    def columns(self, h: int) -> slice:
        """Where the h-th key head lies in the keys, and the h-th value head in the values."""
        return slice(h * self.head_dim, (h + 1) * self.head_dim)


def heads_of(model: nn.Module, key: str) -> Heads:
    """The heads of the attention whose key projection is called `key` in this model.

    Raises:
        ModelError: it is no key projection, or keys and values differ in width.
    """
    path, _, name = key.rpartition(".")
    attention: Any = model.get_submodule(path)
    head_dim = next((getattr(attention, a) for a in HEAD_DIM if hasattr(attention, a)), None)
    if name not in VALUE_OF or head_dim is None or not hasattr(attention, "config"):
        raise ModelError(
            f"`{key}` is not the key projection ({', '.join(VALUE_OF)}) of an attention: target those, or leave "
            "`target_modules` out"
        )
    width, other = (_width(getattr(attention, part, None), fused=name == "c_attn") for part in (name, VALUE_OF[name]))
    if width is None or width % head_dim or width != other:
        raise ModelError(f"the attention around `{key}` has no keys and values of one width: exclude it")
    return Heads(
        config=attention.config,
        width=width,
        head_dim=head_dim,
        groups=getattr(attention, "num_key_value_groups", 1),
        value=VALUE_OF[name],
        normed=any(isinstance(getattr(attention, norm, None), nn.Module) for norm in KEY_NORMS),
    )


def _width(projection: Any, fused: bool) -> int | None:
    """Of the keys or values that a projection computes; None where they cannot be told."""
    base = projection.get_base_layer() if isinstance(projection, BaseTunerLayer) else projection
    if fused:
        return base.nf // 3 if isinstance(base, Conv1D) else None
    return getattr(base, "out_features", None)


def key_projections(model: nn.Module) -> set[str]:
    """Ends of module names by which the key projections of all self-attentions, and nothing else, are found; of a model
    that reads images and answers in words those of its decoder.

    Raises:
        ModelError: there is none of a known name.
    """
    names = [name for name, _ in model.named_modules() if name]
    decoder = decoder_name(model)
    keys = {name for name in names if name.startswith(decoder) and _is_key_projection(model, name)}
    if not keys:
        raise ModelError(
            f"no attention of {type(model).__name__} has a key projection of a known name ({', '.join(VALUE_OF)}): "
            "use a tuner of another kind"
        )
    for parts in range(1, 1 + max(name.count(".") for name in keys)):
        ends = {".".join(name.split(".")[-parts:]) for name in keys}
        if keys == {name for name in names for end in ends if f".{name}".endswith(f".{end}")}:
            return ends
    return keys


def counted(model: nn.Module, ends: set[str], numbers: int | Sequence[int] | None) -> set[str]:
    """Whole names of the modules with one of these ends that have these numbers among them (None: all): peft itself
    counts layers neither for whole names nor in a list that is the model's own."""
    names = [name for name, _ in model.named_modules() if any(ends_with(name, end) for end in ends)]
    chosen = range(len(names)) if numbers is None else [numbers] if isinstance(numbers, int) else numbers
    return {name for i, name in enumerate(names) if i in chosen}


def _is_key_projection(model: nn.Module, name: str) -> bool:
    *path, last = name.split(".")
    attention = model.get_submodule(".".join(path))
    known = last in VALUE_OF and hasattr(attention, VALUE_OF[last]) and any(hasattr(attention, a) for a in HEAD_DIM)
    return known and CROSS_ATTENTIONS.isdisjoint(path)
