"""Which modules of a model a tuner acts on, found by the names that transformers gives them."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..core.errors import ModelError, nearest
from ..models.towers import decoder_name

QUERY_VALUE = "query_value"
QUERY_KEY_VALUE = "query_key_value_all"
ATTENTIONS = "attentions"
BLOCK_OUTPUTS = "block_outputs"
KEY_VALUE = "key_value"
KEY_VALUE_FFN = "key_value_ffn"
_PROJECTIONS = (  # query, key, value; or all in one
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("c_attn",),
    ("qkv",),
    ("Wqkv",),
    ("query_key_value",),
)
_QUERY_VALUE_NAMES = tuple(tuple(dict.fromkeys((n[0], n[-1]))) for n in _PROJECTIONS)
_NAMES = {QUERY_VALUE: _QUERY_VALUE_NAMES, QUERY_KEY_VALUE: _PROJECTIONS}
_KEY_VALUE_NAMES = tuple(n[-2:] for n in _PROJECTIONS)
_ATTENTION_OUTPUTS = (  # ends of names, as transformers 5 calls them
    "attention.output.dense",
    "attention.attn.o",
    "attention.dense",
    "attention.o_proj",
    "attention.out_lin",
    "attention.out_proj",
    "attn.Wo",
    "attn.c_proj",
    "attn.out_proj",
    "crossattention.c_proj",
    "encoder_attn.out_proj",
    "self_attention.dense",
    "self_attn.dense",
    "self_attn.o_proj",
    "self_attn.out_proj",
    "SelfAttention.o",
    "EncDecAttention.o",
)
_FEED_FORWARD_OUTPUTS = (
    "output.dense",
    "DenseReluDense.wo",
    "down_proj",
    "fc2",
    "feed_forward.output_dense",
    "ffn.lin2",
    "ffn_output",
    "mlp.Wo",
    "mlp.c_proj",
    "mlp.dense_4h_to_h",
    "mlp.fc_out",
)


# They hand the weights of their parts to one function and do not (the second: not always) call the parts.
UNCALLED_PARTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def resolve_targets(model: nn.Module, targets: str | set[str] | list[str]) -> str | list[str]:
    """Target names that exist in this model.

    Raises:
        ModelError: one does not; names the nearest that does. Or what is given are no names.
    """
    kind = type(model).__name__
    given: Any = targets  # of a configuration that no one has checked
    if not isinstance(given, (str, set, list, tuple)) or not all(isinstance(name, str) for name in given):
        raise ModelError(f"`target_modules` holds names of modules, or is one text that fits them, not {given!r}")
    if targets == "all-linear":
        return "all-linear"
    decoder = decoder_name(model)
    if decoder and targets in (QUERY_VALUE, QUERY_KEY_VALUE, KEY_VALUE, KEY_VALUE_FFN, BLOCK_OUTPUTS):
        part = model.get_submodule(decoder.rstrip("."))
        ends = resolve_targets(part, targets)
        return [f"{decoder}{n}" for n, _ in part.named_modules() if any(ends_with(n, end) for end in ends)]
    linear = [n for n, m in model.named_modules() if _is_linear(m)]
    suffixes = {n.rsplit(".", 1)[-1] for n in linear}
    if targets in (QUERY_VALUE, QUERY_KEY_VALUE, KEY_VALUE, KEY_VALUE_FFN):
        # two towers may call theirs by different names
        known = _NAMES.get(str(targets), _KEY_VALUE_NAMES)
        found = [name for names in known if suffixes.issuperset(names) for name in names]
        if found:
            return [*found, *(feed_forward_outputs(model) if targets == KEY_VALUE_FFN else ())]
        words = str(targets).split("_")[:2]
        raise ModelError(
            f"cannot tell the {' and '.join(words)} projections of {kind}; it has {', '.join(sorted(suffixes))}"
        )
    if targets == BLOCK_OUTPUTS:
        return _block_outputs(model)
    if targets == ATTENTIONS:
        return ATTENTIONS  # found by the one tuner that stands beside them
    if isinstance(targets, str):
        return targets  # a regular expression, peft's own convention
    modules = [n for n, _ in model.named_modules()]
    for target in sorted(targets):
        if not any(ends_with(n, target) for n in modules):
            synonyms = [n for names in _QUERY_VALUE_NAMES if target in names for n in _counterparts(target, suffixes)]
            if synonyms:
                raise ModelError(f"no module is called `{target}`; this {kind} calls it `{synonyms[0]}`")
            raise ModelError(f"no module is called `{target}` in this {kind}: {nearest(target, suffixes)}")
    return sorted(targets)


def _block_outputs(model: nn.Module) -> list[str]:
    modules = dict(model.named_modules())
    closed = tuple(f"{n}." for n, m in modules.items() if isinstance(m, UNCALLED_PARTS))
    names = [n for n in modules if not n.startswith(closed)]
    found = [
        [e for e in ends if any(ends_with(n, e) for n in names)] for ends in (_ATTENTION_OUTPUTS, _FEED_FORWARD_OUTPUTS)
    ]
    if not all(found):
        missing = "feed-forward" if found[0] else "attention"
        linear = {n.rsplit(".", 1)[-1] for n, m in modules.items() if _is_linear(m)}
        raise ModelError(
            f"cannot tell the {missing} outputs of {type(model).__name__}: name some of its linear layers in "
            f"`target_modules`: {', '.join(sorted(linear))}"
        )
    return [*found[0], *found[1]]


def feed_forward_outputs(model: nn.Module) -> list[str]:
    """Whole names: some ends are those of attention outputs, too."""
    decoder = decoder_name(model)
    names = [n for n, m in model.named_modules() if n.startswith(decoder) and _is_linear(m)]
    behind_attention = [n for n in names if any(ends_with(n, e) for e in _ATTENTION_OUTPUTS)]
    return [n for n in names if n not in behind_attention and any(ends_with(n, e) for e in _FEED_FORWARD_OUTPUTS)]


def ends_with(name: str, end: str) -> bool:
    return name == end or name.endswith("." + end)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _counterparts(target: str, suffixes: set[str]) -> list[str]:
    for names in _QUERY_VALUE_NAMES:
        if target in names and len(names) == 2:
            position = names.index(target)
            return [other[position] for other in _QUERY_VALUE_NAMES if len(other) == 2 and other[position] in suffixes]
    return []
