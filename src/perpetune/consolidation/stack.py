"""Past adapters stay beside the base, concatenated, as the released O-LoRA code keeps them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ConfigError
from ..models.backbone import Backbone
from ..tuners import PeftTuner, Tuner, check_base_kept
from .base import Consolidation, Files, Session, StoredFiles, stored_adapter

PAST = "past"


@dataclass
class Stack(Consolidation):
    """y = W x + s B_past A_past x + s B_t A_t x: A_past in R^{r(t-1) x d_in} stacks the rows of all past A, B_past the
    columns of all past B; both are frozen. Its cost and memory grow with the number of tasks; `Merge` computes the same
    function at constant cost. LoRA only."""

    branch = "fresh"
    adapters = "sum"
    _past: list[dict[str, Tensor]] = field(default_factory=list, init=False, repr=False, compare=False)
    _files: Files = field(default_factory=dict, init=False, repr=False, compare=False)
    _attached: bool = field(default=False, init=False, repr=False, compare=False)

    def open(self, backbone: Backbone, tuner: Tuner, labels: Sequence[str] = ()) -> None:
        """
        Raises:
            ConfigError: the tuner's initialisation changes the base.
        """
        check_base_kept(tuner, "Stack")
        super().open(backbone, tuner, labels)

    def begin_task(self, session: Session | None) -> None:
        if not _is_lora(self.tuner):
            raise ConfigError("Stack concatenates LoRA adapters: use it with a LoraConfig, or use Merge")
        if not stackable(self.tuner):
            raise ConfigError("Stack needs one rank and the scale alpha / r for all layers: use Merge")
        if self._attached:
            self.backbone.model = self.tuner.detach(self.backbone.model)
        self.backbone.model = self.tuner.attach(self.backbone.model)
        self._attached = True
        if self._past:
            self._add_past()

    def _add_past(self) -> None:
        model = self.backbone.model
        config = copy.deepcopy(model.peft_config["default"])
        scaling = config.lora_alpha / config.r
        config.r *= len(self._past)
        config.lora_alpha = scaling * config.r  # the scale of every task stays s
        model.add_adapter(PAST, config)
        stacked = {
            name: torch.cat([p[name] for p in self._past], dim=0 if "lora_A" in name else 1) for name in self._past[0]
        }
        import peft

        peft.set_peft_model_state_dict(model, stacked, adapter_name=PAST)
        model.base_model.set_adapter(["default", PAST])
        for name, parameter in model.named_parameters():
            if f".{PAST}." in name:
                parameter.requires_grad_(False)

    def end_task(self, session: Session) -> None:
        self._files = self.tuner.files(self.backbone.model)
        self._past.append({k: v.detach().cpu().clone() for k, v in self._files["adapter_model.safetensors"].items()})
        self.backbone.version += 1

    def files(self) -> Files:
        return self._files

    def restore(self, commits: Sequence[StoredFiles]) -> None:
        adapters = [stored_adapter(commit) for commit in commits]
        if not adapters:
            return
        self._past = adapters[:-1]
        self.begin_task(None)
        self.tuner.load(self.backbone.model, adapters[-1])
        self._past.append(adapters[-1])
        self.backbone.version = len(adapters)


def stackable(tuner: Tuner) -> bool:
    """Whether adapters of many tasks can stand in one: LoRA of one rank and scale, and nothing that it cannot hold."""
    config: Any = getattr(tuner, "config", None)
    plain = ("use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "modules_to_save")
    return _is_lora(tuner) and not any(getattr(config, name, None) for name in plain) and config.bias == "none"


def _is_lora(tuner: Tuner) -> bool:
    return isinstance(tuner, PeftTuner) and getattr(tuner.config, "peft_type", None) == "LORA"
