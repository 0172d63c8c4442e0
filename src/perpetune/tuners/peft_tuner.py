"""Any configuration of peft as a tuner."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..core.errors import ModelError, first_line
from ..core.measurement import Measurement
from .base import Tuner
from .targets import KEY_VALUE_FFN, ends_with, feed_forward_outputs, resolve_targets

ROTATIONS = ("OFT", "perpetune_givens")


class PeftTuner(Tuner):
    """Any `peft` configuration.

    Args:
        config: a `PeftConfig`. `target_modules="query_value"` finds this model's query and value projections,
            "block_outputs" the output projections of attention and feed-forward network, "key_value_ffn" keys, values
            and feed-forward outputs (the last alone in `feedforward_modules` of IA3); of a model that reads images and
            answers in words those of its decoder alone.
    """

    def __init__(self, config: Any) -> None:
        self.config = config

    def attach(self, model: nn.Module) -> nn.Module:
        """
        Raises:
            ModelError: the model has no module of the targeted name; the message names those that it has. Or a part of
                it is called as the adapter would be.
        """
        import peft

        from .peft_plugin import check_adapter_name

        check_adapter_name(model, "default")
        config = copy.deepcopy(self.config)
        if isinstance(getattr(config, "target_modules", None), (str, set, list)):
            config.target_modules = resolve_targets(model, config.target_modules)
        if getattr(config, "feedforward_modules", None) == KEY_VALUE_FFN:
            config.feedforward_modules = feed_forward_outputs(model)
        model.requires_grad_(False)
        with warnings.catch_warnings():  # peft 0.21 asks transformers 5.23 for a name that is about to change
            warnings.simplefilter("ignore", FutureWarning)
            try:
                return peft.get_peft_model(model, config)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                kind = f"{type(config).__name__} on {type(model).__name__}"
                raise ModelError(f"peft cannot put {kind}: {first_line(error)}: change the tuner's settings") from error

    @property
    def additive(self) -> bool:
        c = self.config
        plain = not any(getattr(c, name, False) for name in ("use_dora", "lora_bias", "use_qalora"))
        gaussian = getattr(c, "init_lora_weights", True) in (True, False, "gaussian")  # others change the base weights
        return self._kind() in ("LORA", "LOHA", "LOKR", "perpetune_bias") and plain and gaussian

    @property
    def multiplicative(self) -> bool:
        return self._kind() in ROTATIONS

    def turn(self, model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self.multiplicative:
            return super().turn(model, weights)
        from .rotations import turns

        return {t.name: t(weights.get(t.name, t.layer.get_base_layer().weight)) for t in turns(model)}

    def guarantee(self, model: nn.Module, since: Mapping[str, Tensor]) -> list[Measurement]:
        if not self.multiplicative:
            return []
        from .rotations import kept_geometry

        exact = getattr(self.config, "form", "strict") == "strict"  # peft's OFT has no form
        return kept_geometry(model, since, exact, type(self.config).__name__)

    def _kind(self) -> str:
        return str(getattr(self.config.peft_type, "value", self.config.peft_type))

    def detach(self, model: Any) -> nn.Module:
        return model.unload()

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        import peft

        return {k: v.contiguous() for k, v in peft.get_peft_model_state_dict(model).items()}

    def load(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        import peft

        result: Any = peft.set_peft_model_state_dict(model, dict(tensors))
        if result.unexpected_keys:
            raise ModelError(
                f"the stored adapter does not fit this model: it has no place for {result.unexpected_keys[0]} "
                f"({len(result.unexpected_keys)} tensors in all)"
            )

    def files(self, model: Any) -> dict[str, Any]:
        return {"adapter_model.safetensors": self.tensors(model), "adapter_config.json": peft_dict(_fitted(model))}

    def deltas(self, model: Any) -> dict[str, Tensor]:
        base_names = {id(p): n for n, p in model.get_base_model().named_parameters()}
        found = {}
        for module in model.modules():
            layer: Any = module
            for key in ("weight", "bias"):
                if hasattr(layer, f"get_delta_{key}") and hasattr(layer, "base_layer"):
                    parameter = getattr(layer.get_base_layer(), key)
                    name = base_names[id(parameter)].replace(".base_layer.", ".")
                    found[name] = getattr(layer, f"get_delta_{key}")("default").detach().float()
        if not found:
            return super().deltas(model)
        return found


def _fitted(model: Any) -> Any:
    """The configuration of an attached model, with the whole names of the modules that it tunes.

    Ends of names (to which peft 0.21 shortens what "all-linear" found) may fit more modules where the adapter is loaded
    later: `dense` is in the pooler, too, with which `AutoModel` loads a BERT and the backbone does not.
    """
    config = copy.copy(model.peft_config["default"])
    tuned = sorted(getattr(model.base_model, "targeted_module_names", ()))
    others = {name for name, _ in model.get_base_model().named_modules()}.difference(tuned)
    if not tuned or any(name.endswith(tuple(f".{t}" for t in tuned)) for name in others):
        return config  # whole names would fit more modules than what the user chose
    config.target_modules = tuned
    if isinstance(ends := getattr(config, "feedforward_modules", None), (set, list)):  # IA3: some of the targets
        config.feedforward_modules = [name for name in tuned if any(ends_with(name, end) for end in ends)]
    return config


def peft_dict(config: Any) -> dict[str, Any]:
    """A peft configuration as JSON-able data, the same bytes in every process (peft writes sets in hash order)."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, (set, frozenset)):
            return sorted(value)
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return getattr(value, "value", value)

    return {**plain(config.to_dict()), "inference_mode": True}


def as_tuner(tuner: Any) -> Tuner:
    """A tuner as it is, or a `PeftConfig` wrapped as one; a configuration may have a tuner of its own."""
    if isinstance(tuner, Tuner):
        return tuner
    return tuner.as_tuner() if hasattr(tuner, "as_tuner") else PeftTuner(tuner)
