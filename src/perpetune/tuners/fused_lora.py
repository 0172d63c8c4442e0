"""One LoRA on query, key and value as if they were one layer, as models with a fused `qkv` have it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import peft
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..core.errors import ConfigError
from .peft_tuner import PeftTuner
from .targets import ends_with, resolve_targets


@dataclass
class FusedLoraConfig(peft.LoraConfig):
    """LoRA in which the targeted layers of one parent share A: B A with B = [B_q; B_k; B_v] on W = [W_q; W_k; W_v].

    That is the LoRA of a fused `qkv` layer, for models that keep the three apart: 4 r d numbers instead of 6 r d, with
    d inputs and outputs each. A stored adapter is one of `peft.LoraConfig` with as many equal A, and loads as such.
    Layers that read another width keep an A of their own.
    """

    blocks: int | None = field(default=None, metadata={"help": "The first so many parents alone; None: all."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocks is not None and (type(self.blocks) is not int or self.blocks < 1):
            raise ConfigError(f"FusedLoraConfig: blocks={self.blocks!r} must be a whole number above 0, or left out")

    def as_tuner(self) -> FusedLoraTuner:
        return FusedLoraTuner(self)


class FusedLoraTuner(PeftTuner):
    """What `as_tuner` makes of a `FusedLoraConfig`."""

    def _resolved(self, model: nn.Module) -> Any:
        """A configuration of peft's own, with the names of this model."""
        config = super()._resolved(model)
        settings = {f.name: getattr(config, f.name) for f in fields(peft.LoraConfig) if f.init}
        if config.blocks is not None:
            ends = resolve_targets(model, config.target_modules)
            names = [n for n, _ in model.named_modules() if any(ends_with(n, end) for end in ends)]
            parents = list(dict.fromkeys(map(_parent, names)))[: config.blocks]
            settings["target_modules"] = [name for name in names if _parent(name) in parents]
        return peft.LoraConfig(**settings)

    def attach(self, model: nn.Module) -> nn.Module:
        """
        Raises:
            ModelError: see `PeftTuner.attach`.
        """
        attached = super().attach(model)
        first: dict[tuple[str, str, int], nn.Parameter] = {}
        for name, module in attached.named_modules():
            if isinstance(module, LoraLayer):
                for adapter, A in module.lora_A.items():
                    factor: Any = A
                    key = (_parent(name), adapter, factor.weight.shape[1])
                    factor.weight = first.setdefault(key, factor.weight)
        return attached

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in super().tensors(model).items()}  # files hold no tensor twice


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
