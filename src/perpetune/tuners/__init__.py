"""Where the change lives: peft's configurations, and what peft lacks."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .base import Additive, AllWeights, Frozen, Multiplicative, NoNetwork, Tuner, base_names, check_base_kept
from .peft_tuner import PeftTuner, as_tuner
from .targets import ATTENTIONS, KEY_VALUE, KEY_VALUE_FFN, QUERY_KEY_VALUE, QUERY_VALUE

TUNERS = {c.__name__: c for c in (AllWeights, Frozen, NoNetwork)}

# peft configurations of ours, and the module of each
OWN_CONFIGS = {
    "AdapterConfig": "adapter",
    "BiasConfig": "bias",
    "DeepPromptConfig": "prefix",
    "FusedLoraConfig": "fused_lora",
    "GivensConfig": "givens",
    "PrefixConfig": "prefix",
}

_HOME = {**OWN_CONFIGS, "load_adapter": "peft_plugin"}

__all__ = [
    "ATTENTIONS",
    "KEY_VALUE",
    "KEY_VALUE_FFN",
    "OWN_CONFIGS",
    "QUERY_KEY_VALUE",
    "QUERY_VALUE",
    "TUNERS",
    "Additive",
    "AllWeights",
    "Frozen",
    "Multiplicative",
    "NoNetwork",
    "PeftTuner",
    "Tuner",
    "as_tuner",
    "base_names",
    "check_base_kept",
    *_HOME,
]


def __getattr__(name: str) -> Any:
    # peft takes seconds to import
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module `{__name__}` has no attribute `{name}`")
