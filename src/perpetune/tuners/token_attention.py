"""Tokens that serve only as keys and values, in every attention that goes through transformers' interface.

A layer around the key projection of an attention holds the tokens. One attention function, set on the whole model,
finds that layer, puts the tokens before the keys and values and calls transformers' own sdpa function. It runs behind
the generation cache, which therefore never holds the tokens, and behind the position encoding, which they do not get.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..core.errors import ModelError, RuleError
from .key_projections import Heads
from .linear_map import Tap
from .peft_plugin import OwnLayer

IMPLEMENTATION = "perpetune_sdpa"  # because of "sdpa", transformers refuses models whose attention sdpa cannot compute
Implementations = list[tuple[Any, str | None]]


class TokenLayer(OwnLayer):
    """A key projection that brings tokens along; it computes what the projection alone computes.

    A tuner adds `adapter_layer_names`, whose parameters have one row for each token, `_new`, `tokens` and `show`.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, heads: Heads) -> None:
        self.heads = heads  # first, as what follows makes the first adapter, whose shape depends on it
        super().__init__(base_layer, adapter_name, config)

    def _containers(self) -> None:
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.taps: dict[str, Tap] = {}  # no attribute each, so that peft does not take them for weights

    def tokens(self, attention: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of all live tokens, n x (H_kv head_dim) each."""
        raise NotImplementedError

    def show(self, query: Tensor, weights: Callable[[], Tensor]) -> None:
        """Hand to the taps what the tokens of the trained adapter act on.

        Args:
            query: N x H x T x head_dim, as the attention gets it (with rotary positions, for instance).
            weights: computes the attention weights on all live tokens, N x H x T x n.
        """
        raise NotImplementedError

    def live(self) -> list[str]:
        """The adapters whose tokens take part in a forward pass, in the order of their tokens."""
        return self._live(getattr(self, self.adapter_layer_names[0]))

    def trained(self) -> str | None:
        """The live adapter that is trained.

        Raises:
            RuleError: there are several.
        """
        containers = [getattr(self, name) for name in self.adapter_layer_names]
        names = [name for name in self.live() if any(c[name].requires_grad for c in containers)]
        if len(names) > 1:
            raise RuleError(f"adapters {', '.join(names)} train at once: freeze all but one")
        return names[0] if names else None

    def trained_slots(self) -> slice:
        """Where the tokens of the trained adapter are among all live tokens."""
        trained, first = self.trained(), 0
        for name in self.live():
            last = first + len(getattr(self, self.adapter_layer_names[0])[name])
            if name == trained:
                return slice(first, last)
            first = last
        return slice(0, 0)

    def tap(self, name: str) -> Tap:
        return self.taps.setdefault(name, Tap())

    def listeners(self) -> dict[str, Tap]:
        """The taps to which somebody listens."""
        return {name: tap for name, tap in self.taps.items() if tap.listening}

    def forward(self, x: Tensor) -> Tensor:
        set_to = self.heads.config._attn_implementation
        if set_to != IMPLEMENTATION and self.live():
            raise ModelError(
                f"the attention of this model is `{set_to}`, which passes over the tokens of its adapter: call "
                f'`set_attn_implementation("{IMPLEMENTATION}")`'
            )
        return self.base_layer(x)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """softmax(s q [K_p; k]^T + bias) [V_p; v], where the module has tokens K_p, V_p; else transformers' sdpa function.

    Args:
        module: the attention; its tokens are in the first `TokenLayer` below it.
        query: N x H x T x head_dim.
        key, value: N x H_kv x S x head_dim.
        attention_mask: N x 1 x T x S, bool (True is seen) or added to the scores; None: all is seen or, if causal, what
            is not later. Tokens are always seen.
        scaling: s; None is head_dim^-1/2.
        is_causal: None takes the module's own.
        position_bias: 1 x H x T x S, added to the scores.

    Raises:
        ModelError: continuous batching, whose paged cache would store the tokens.
    """
    layer = next((m for m in module.modules() if isinstance(m, TokenLayer)), None)
    if layer is None or not layer.live():
        options = {"scaling": scaling, "is_causal": is_causal, "position_bias": position_bias, **kwargs}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if kwargs.get("cache") is not None:
        raise ModelError("prefixes and prompts do not work with continuous batching: use `generate`")
    T = query.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and causal and T > 1:
        # Where transformers gives no mask, keys beyond the queries are places of a static cache not yet filled.
        key, value = key[:, :, :T], value[:, :, :T]
        position_bias = None if position_bias is None else position_bias[..., :T]
        attention_mask = torch.ones(1, 1, T, T, dtype=torch.bool, device=query.device).tril()

    K, V = (  # n x (H_kv head_dim) to N x H_kv x n x head_dim
        t.unflatten(-1, (key.shape[1], -1)).transpose(0, 1).expand(len(key), -1, -1, -1)
        for t in layer.tokens(module, key.dtype)
    )
    n = K.shape[2]
    key, value = torch.cat([K, key], 2), torch.cat([V, value], 2)
    if attention_mask is not None:
        attention_mask = pad(attention_mask, (n, 0), value=float(attention_mask.dtype == torch.bool))
    if position_bias is not None:
        position_bias = pad(position_bias, (n, 0))
    if layer.listeners():
        scores = (query, key, attention_mask, position_bias, scaling)
        layer.show(query, cache(lambda: attention_weights(*scores)[..., :n]))
    options = {"scaling": scaling, "is_causal": False, "position_bias": position_bias, **kwargs}
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def attention_weights(
    query: Tensor, key: Tensor, mask: Tensor | None, position_bias: Tensor | None, scaling: float | None
) -> Tensor:
    """softmax(s q k^T + bias), N x H x T x S, in fp32 at least; arguments as those of `attend`."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    key = key.to(dtype).repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query.to(dtype) @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if position_bias is not None:
        scores = scores + position_bias
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1)


AttentionInterface.register(IMPLEMENTATION, attend)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def implementations(model: nn.Module) -> Implementations:
    """The configuration of every transformers model in a model and of their parts, the whole before its parts, each
    with the attention function that it names."""
    found: Implementations = []
    left = deque(m.config for m in model.modules() if isinstance(m, PreTrainedModel))
    while left:
        config = left.popleft()
        if not any(config is known for known, _ in found):
            found.append((config, config._attn_implementation))
            left.extend(part for name in config.sub_configs if (part := getattr(config, name, None)) is not None)
    return found


def restore(before: Implementations) -> None:
    """Inverse of `use_tokens`, from what `implementations` gave before it."""
    for config, implementation in before:  # setting the whole sets its parts, which come later
        config._attn_implementation = implementation


def use_tokens(model: nn.Module) -> None:
    """Set `attend` on every transformers model in a model.

    Raises:
        ModelError: there is none, or one whose attention does not go through transformers' interface, or is not what
            its sdpa function computes.
    """
    parts = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    if not parts:
        raise ModelError(f"{type(model).__name__} is no transformers model: prefixes and prompts need its attention")
    before = implementations(model)
    for part in parts:
        try:
            if part.config._attn_implementation != IMPLEMENTATION:  # not yet set with the whole that it is part of
                part.set_attn_implementation(IMPLEMENTATION)
            reason = "" if part.config._attn_implementation == IMPLEMENTATION else "its code does not use the interface"
        except ValueError as error:
            reason = str(error).partition(". ")[0]
        if reason:
            restore(before)
            raise ModelError(
                f"prefixes and prompts need transformers' attention interface, which {type(part).__name__} lacks "
                f"({reason}): use a tuner of another kind"
            )
