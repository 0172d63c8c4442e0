"""Prefixes and deep prompts: trained tokens that every attention reads beside those of the input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core.errors import ModelError
from .key_projections import Heads
from .linear_map import LinearMap
from .peft_plugin import register
from .token_attention import TokenLayer
from .virtual_tokens import TokenConfig, TokenTuner, check_condition


@dataclass
class PrefixConfig(TokenConfig):
    """Trained keys and values before those of the input, in every attention.

    K = [K_p; x W_K], V = [V_p; x W_V], with K_p and V_p in R^{n x (H_kv head_dim)} free of projection, normalisation
    and position. Several active adapters stand one behind the other. `target_modules=None` finds the key projection of
    every self-attention, around which the layers are put.

    Source: Li and Liang, prefix-tuning (2101.00190), without the network that makes their prefix.

    Raises:
        ConfigError: no token, or a negative spread.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "perpetune_prefix"


@dataclass
class DeepPromptConfig(TokenConfig):
    """Trained tokens P in R^{n x d}, others in every attention, that serve only as keys and values.

    k_p = W_k p + b_k, v_p = W_v p + b_v, without a position. That is VPT-Deep (2203.12119), which drops the outputs of
    its prompts in every layer, but for one thing: P stands behind the LayerNorm, where the projections read. Only so
    are the conditions exact under which old outputs stay: a LayerNorm between P and the projections breaks them (a
    relative change of 0.17 instead of 1e-15).

    Several active adapters stand one behind the other. `target_modules=None` finds the key projection of every
    self-attention, around which the layers are put.

    Raises:
        ConfigError: no token, or a negative spread.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "perpetune_prompt"


def _block(values: Tensor, columns: slice, transposed: bool) -> Tensor:
    return values[:, columns].mT if transposed else values[:, columns]


def _transposed(values: Tensor) -> Tensor:
    return values.mT


class PrefixLinear(TokenLayer):
    """A key projection with prefixes; see `PrefixConfig`."""

    adapter_layer_names = ("perpetune_prefix_K", "perpetune_prefix_V")
    perpetune_prefix_K: nn.ParameterDict
    perpetune_prefix_V: nn.ParameterDict

    def _new(self, adapter_name: str, config: PrefixConfig) -> None:
        for container in (self.perpetune_prefix_K, self.perpetune_prefix_V):
            tokens = torch.randn(config.num_virtual_tokens, self.heads.width)
            container[adapter_name] = nn.Parameter(config.init_std * tokens)

    def tokens(self, attention: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        K, V = (
            torch.cat([container[name] for name in self.live()]).to(dtype)
            for container in (self.perpetune_prefix_K, self.perpetune_prefix_V)
        )
        return K, V

    def linear_maps(self, condition: str) -> list[LinearMap]:
        """What the projection rule must know to keep old outputs: of the trained adapter, if there is one.

        "per_head"   for every key head h, `key.h`: K_h (n x head_dim) reads the queries of all heads that share it, and
                     `value.h`: V_h^T (head_dim x n) reads their attention weights on the prefix. Sufficient.
        "published"  `key`: K_p reads queries of full width, all heads in one; V_p is free (PEGP, 2405.13383).

        Raises:
            RuleError: an unknown condition, or several adapters that train at once.
            ModelError: "published", where keys are shared by heads.
        """
        check_condition(condition)
        name = self.trained()
        if name is None:
            return []
        K, V, heads = self.perpetune_prefix_K[name], self.perpetune_prefix_V[name], self.heads
        if condition == "published":
            if heads.groups > 1:
                raise ModelError(
                    f"queries of full width do not fit keys that {heads.groups} heads share: use `per_head`"
                )
            return [LinearMap("key", K, (self.tap("key"),))]
        maps = []
        for h in range(heads.width // heads.head_dim):
            K_h, V_h = (partial(_block, columns=heads.columns(h), transposed=t) for t in (False, True))
            maps.append(LinearMap(f"key.{h}", K, (self.tap(f"key.{h}"),), K_h))
            maps.append(LinearMap(f"value.{h}", V, (self.tap(f"value.{h}"),), V_h, rows=1))
        return maps

    def show(self, query: Tensor, weights: Callable[[], Tensor]) -> None:
        slots = self.trained_slots()
        for name, tap in self.listeners().items():
            kind, _, h = name.partition(".")
            if not h:
                tap(query.transpose(1, 2).flatten(2))  # N x T x d_kv
                continue
            first = int(h) * self.heads.groups
            for i in range(first, first + self.heads.groups):
                tap(query[:, i] if kind == "key" else weights()[:, i, :, slots])  # N x T x head_dim, N x T x n


class PromptLinear(TokenLayer):
    """A key projection with prompts; see `DeepPromptConfig`."""

    adapter_layer_names = ("perpetune_prompt_P",)
    perpetune_prompt_P: nn.ParameterDict

    def _new(self, adapter_name: str, config: DeepPromptConfig) -> None:
        base: Any = self.get_base_layer()
        tokens = torch.randn(config.num_virtual_tokens, base.nx if isinstance(base, Conv1D) else base.in_features)
        self.perpetune_prompt_P[adapter_name] = nn.Parameter(config.init_std * tokens)

    def tokens(self, attention: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        P = torch.cat([self.perpetune_prompt_P[name] for name in self.live()]).to(dtype)
        if isinstance(self.get_base_layer(), Conv1D):
            _, K, V = self.base_layer(P).chunk(3, -1)
            return K, V
        return self.base_layer(P), attention.get_submodule(self.heads.value)(P)

    def forward(self, x: Tensor) -> Tensor:
        tap = self.taps.get("tokens")
        name = self.trained() if tap is not None and tap.listening else None
        if tap is not None and name is not None:
            tap(x)
            tap(self.perpetune_prompt_P[name].detach()[None])  # 1 x n x d
        return super().forward(x)

    def linear_maps(self, condition: str) -> list[LinearMap]:
        """What the projection rule must know to keep old outputs: of the trained adapter, if there is one.

        "per_head"   `affinity`: P reads u = W_k,h^T q_h of every query head h; `aggregation`: P^T (d x n) reads the
                     attention weights of every head on the prompt. Sufficient (VPT-NSP2, 2406.05658).
        "published"  `tokens`: P reads the layer's input and itself (PGP, PEGP). Not sufficient.

        Raises:
            RuleError: an unknown condition, or several adapters that train at once.
        """
        check_condition(condition)
        name = self.trained()
        if name is None:
            return []
        P = self.perpetune_prompt_P[name]
        if condition == "published":
            return [LinearMap("tokens", P, (self.tap("tokens"),))]
        return [
            LinearMap("affinity", P, (self.tap("affinity"),)),
            LinearMap("aggregation", P, (self.tap("aggregation"),), _transposed, rows=1),
        ]

    def show(self, query: Tensor, weights: Callable[[], Tensor]) -> None:
        listeners, slots = self.listeners(), self.trained_slots()
        W_k = self.get_base_weight()
        if isinstance(self.get_base_layer(), Conv1D):
            W_k = W_k.mT[self.heads.width : 2 * self.heads.width]
        dtype = torch.promote_types(query.dtype, torch.float32)
        for i in range(query.shape[1]):
            if "affinity" in listeners:
                W_kh = W_k[self.heads.columns(i // self.heads.groups)]  # head_dim x d
                listeners["affinity"](query[:, i].to(dtype) @ W_kh.to(dtype))  # N x T x d
            if "aggregation" in listeners:
                listeners["aggregation"](weights()[:, i, :, slots])  # N x T x n


class PrefixModel(TokenTuner):
    """A model with prefixes."""

    prefix = "perpetune_prefix_"
    tuner_layer_cls = PrefixLinear


class DeepPromptModel(TokenTuner):
    """A model with deep prompts."""

    prefix = "perpetune_prompt_"
    tuner_layer_cls = PromptLinear

    def _check_heads(self, heads: Heads, key: str) -> None:
        if heads.normed:
            raise ModelError(f"keys or values are normalised behind `{key}`, prompts would not be: use `PrefixConfig`")


register("perpetune_prefix", PrefixConfig, PrefixModel)
register("perpetune_prompt", DeepPromptConfig, DeepPromptModel)
