"""What prefixes and prompts have in common: their settings, and the model that they are put on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..core.errors import ConfigError, ModelError, RuleError, nearest
from .key_projections import Heads, counted, heads_of, key_projections
from .peft_plugin import OwnConfig, OwnTuner
from .token_attention import TokenLayer, implementations, restore, use_tokens

NOT_MERGEABLE = "prefixes and prompts are tokens, and no weight of the model could hold them: keep them as an adapter"
CONDITIONS = ("per_head", "published")


@dataclass
class TokenConfig(OwnConfig):
    """What prefixes and prompts have in common.

    Tokens start with a spread somewhat below that of what stands beside them (behind a LayerNorm entries are of order
    1; in MiniLM 0.5, and 0.6 to 1 in keys and values): with 1 they disturb the model at once, and training ended with
    a higher loss; with 0.02 it went as with 0.2.
    """

    num_virtual_tokens: int = field(default=16, metadata={"help": "n, tokens in every attention."})
    init_std: float = field(default=0.2, metadata={"help": "Standard deviation of the tokens at the start."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_virtual_tokens < 1:
            raise ConfigError(f"`num_virtual_tokens` = {self.num_virtual_tokens}: give at least 1")
        if not 0 <= self.init_std < float("inf"):
            raise ConfigError(f"`init_std` = {self.init_std}: give 0 or a positive number")


def check_condition(condition: str) -> None:
    """
    Raises:
        RuleError: an unknown condition.
    """
    if condition not in CONDITIONS:
        raise RuleError(f"no condition is called `{condition}`: {nearest(condition, CONDITIONS)}")


class TokenTuner(OwnTuner):
    """A model with tokens. The attention function is set when the first adapter comes, and back when the last goes."""

    tuner_layer_cls: type[TokenLayer]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        before = implementations(model)
        use_tokens(model)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            restore(before)
            raise
        self.__dict__.setdefault("_before", before)

    def unload(self) -> nn.Module:
        model = super().unload()
        restore(self.__dict__.pop("_before", []))
        return model

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        if not self.peft_config:
            restore(self.__dict__.pop("_before", []))

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        if peft_config.target_modules == "all-linear":
            raise ModelError("prefixes and prompts stand at key projections: leave `target_modules` out to find them")
        if peft_config.target_modules is None:
            names, chosen = key_projections(self.model), peft_config.layers_to_transform
            if chosen is not None and peft_config.layers_pattern is None:
                names = counted(self.model, names, chosen)
                peft_config.layers_to_transform = None
            peft_config.target_modules = names
        return peft_config

    def _new_layer(self, config: TokenConfig, adapter_name: str, target: nn.Module, key: str) -> nn.Module:
        if isinstance(target, BaseTunerLayer):
            raise ModelError(f"`{key}` has a {type(target).__name__} already: use one tuner, or exclude this module")
        heads = heads_of(self.model, key)
        self._check_heads(heads, key)
        return self.tuner_layer_cls(target, adapter_name, config, heads)

    def _check_heads(self, heads: Heads, key: str) -> None:
        """Raise a ModelError where the tokens do not suit the attention around `key`."""

    def _check_merge_allowed(self) -> None:
        raise ModelError(NOT_MERGEABLE)
