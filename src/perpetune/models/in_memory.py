"""A model that the user holds already, with what reads its inputs."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from ..core.errors import ConfigError
from .precision import Loading

DECIDED = ("dtype", "quantization", "gguf_file", "attn_implementation", "device_map")


@dataclass(frozen=True)
class InMemory:
    """A transformers model and its tokenizer, image processor or processor. A run takes copies: the user's own stays as
    it is, and is what the run's base is loaded from again."""

    model: Any
    processor: Any

    @classmethod
    def of(cls, model: Any, processor: Any = None) -> InMemory | None:
        """What `Learner(model=...)` was given, if it is no name.

        Raises:
            ConfigError: a model without a tokenizer or processor, or something else.
        """
        if model is None or isinstance(model, str) or hasattr(model, "__fspath__"):
            if processor is not None:
                raise ConfigError("processor belongs to a model in memory: leave it out beside a hub id or a folder")
            return None
        if isinstance(model, tuple) and len(model) == 2:
            model, processor = model
        if not hasattr(model, "state_dict") or not hasattr(model, "config"):
            raise ConfigError(
                f"model is a hub id, a folder, or (model, tokenizer) of transformers, not {type(model).__name__}"
            )
        if processor is None:
            raise ConfigError(
                f"{type(model).__name__} comes without what reads its inputs: give model=(model, tokenizer), or "
                "processor="
            )
        if hasattr(model, "peft_config"):
            raise ConfigError(
                "the model in memory has adapters already: give the plain one (model.merge_and_unload() merges them)"
            )
        return cls(model, processor)

    @property
    def name(self) -> str:
        return f"{type(self.model).__name__} in memory"

    def taken(self, loading: Loading) -> tuple[Any, Any]:
        """Copies of both.

        Raises:
            ConfigError: settings that decide how weights are loaded, which these are already.
        """
        given = [name for name in DECIDED if getattr(loading, name) is not None]
        if given:
            raise ConfigError(f"a model in memory is taken as it is: leave {', '.join(given)} out, or give its folder")
        return copy.deepcopy(self.model), copy.deepcopy(self.processor)
