"""Any configuration of peft as a tuner."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ModelError, first_line
from ..core.measurement import Measurement
from .base import Additive, Change, Multiplicative, Tuner, base_names
from .shared_weights import refuse_shared
from .targets import KEY_VALUE_FFN, ends_with, feed_forward_outputs, resolve_targets

BESIDE_BASE = ("gaussian", "eva", "orthogonal", "mica")  # values of init_lora_weights, beside true and false
PARTS = ("weight", "bias")


class PeftTuner(Tuner):
    """Any `peft` configuration.

    Args:
        config: a `PeftConfig`. `target_modules="query_value"` finds this model's query and value projections,
            "key_value" its key and value projections, "block_outputs" the output projections of attention and
            feed-forward network, "key_value_ffn" keys, values and feed-forward outputs (the last alone in
            `feedforward_modules` of IA3); of a model that reads images and answers in words those of its decoder alone.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self._adds: dict[type, bool] = {}  # by kind of layer

    def check(self, model: nn.Module) -> None:
        """
        Raises:
            ModelError: the model has no module of the targeted name; the message names those that it has. Or a part of
                it is called as the adapter would be, or what is targeted shares its weight with what is not.
        """
        self._resolved(model)

    def _resolved(self, model: nn.Module) -> Any:
        """The configuration with the names of this model."""
        from .peft_plugin import check_adapter_name

        check_adapter_name(model, "default")
        config = copy.deepcopy(self.config)
        if isinstance(getattr(config, "target_modules", None), (str, set, list)):
            config.target_modules = resolve_targets(model, config.target_modules)
        if getattr(config, "feedforward_modules", None) == KEY_VALUE_FFN:
            config.feedforward_modules = feed_forward_outputs(model)
        refuse_shared(model, config)
        return config

    def attach(self, model: nn.Module) -> nn.Module:
        """
        Raises:
            ModelError: see `check`; or peft refuses the configuration.
        """
        import peft

        config = self._resolved(model)
        model.requires_grad_(False)
        with warnings.catch_warnings():  # peft 0.21 asks transformers 5.23 for a name that is about to change
            warnings.simplefilter("ignore", FutureWarning)
            try:
                if self.changes_base:  # also by random numbers ("pissa_niter_4"): the base must be the same once more
                    with torch.random.fork_rng(devices=[]):
                        torch.manual_seed(0)
                        return peft.get_peft_model(model, config)
                return peft.get_peft_model(model, config)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                kind = f"{type(config).__name__} on {type(model).__name__}"
                raise ModelError(f"peft cannot put {kind}: {first_line(error)}: change the tuner's settings") from error

    def change(self, model: nn.Module) -> Change | None:
        """See `Tuner.change`. The layers are asked, not the configuration: whether they rotate their inputs, whether
        merging one adds to its weights what `get_delta_weight` says (a DoRA has that, too, and adds something else).

        What trains beside the adapters (biases, whole modules) makes it neither.
        """
        layers = [m for m in model.modules() if isinstance(m, _tuner_layer()) and "default" in _adapters_of(m)]
        own = {id(p) for layer in layers for p in _adapter_parameters(layer)}
        if not layers or any(p.requires_grad and id(p) not in own for p in model.parameters()):
            return None
        if self.rotates:
            from .rotations import turns

            return Multiplicative(
                lambda weights: {t.name: t(weights.get(t.name, t.layer.get_base_layer().weight)) for t in turns(model)}
            )
        smallest = sorted(layers, key=lambda layer: sum(p.numel() for p in layer.parameters()), reverse=True)
        for kind, layer in {type(layer): layer for layer in smallest}.items():
            if kind not in self._adds:
                self._adds[kind] = adds(layer)
        return Additive(lambda: _deltas(model)) if all(self._adds[type(layer)] for layer in layers) else None

    @property
    def rotates(self) -> bool:
        import peft.mapping

        from .rotations import turning

        tuner: Any = peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING.get(self.config.peft_type)
        return turning(getattr(tuner, "tuner_layer_cls", object))

    @property
    def changes_base(self) -> bool:
        return changes_base(self.config)

    def guarantee(self, model: nn.Module, since: Mapping[str, Tensor]) -> list[Measurement]:
        if not self.rotates:
            return []
        from .rotations import kept_geometry

        exact = getattr(self.config, "form", "strict") == "strict"  # peft's OFT has no form
        return kept_geometry(model, since, exact, type(self.config).__name__)

    def detach(self, model: Any) -> nn.Module:
        return model.unload()

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The adapter alone. peft would compare the vocabulary with that of the base's files, or ask the Hub for them,
        at every save, and store resized embeddings; the base is known by its fingerprint."""
        import peft
        from peft.utils.constants import EMBEDDING_LAYER_NAMES

        tuned = getattr(model.base_model, "targeted_module_names", ())
        embedded = any(name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES for name in tuned)
        found = peft.get_peft_model_state_dict(model, save_embedding_layers="auto" if embedded else False)
        return {k: v.contiguous() for k, v in found.items()}

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


def changes_base(config: Any) -> bool:
    """Whether adapters of this peft configuration start with a part of W, which is taken out of the base (PiSSA, OLoRA,
    CorDA, LoRA-GA, LoftQ): all initialisations of LoRA but those that peft 0.21 lets start beside W."""
    init = getattr(config, "init_lora_weights", True)
    return isinstance(init, str) and init.lower() not in BESIDE_BASE


@torch.no_grad()
def adds(layer: Any) -> bool:
    """Whether merging the adapter of a peft layer adds `get_delta_weight` (or `get_delta_bias`) to it, whatever the
    weight is, and changes nothing else. Tried on copies with adapters that are not at their start."""
    keys = [key for key in PARTS if hasattr(layer, f"get_delta_{key}")]
    found = []
    for factor in (1.0, 0.5):
        tried = copy.deepcopy(layer)
        noise = torch.Generator().manual_seed(0)
        for p in _adapter_parameters(tried):
            p.add_(0.1 * torch.randn(p.shape, generator=noise).to(p))
        base = tried.get_base_layer()
        weights = {key: getattr(base, key) for key in PARTS if isinstance(getattr(base, key, None), Tensor)}
        if not keys or not weights.keys() >= {*keys} or not all(w.is_floating_point() for w in weights.values()):
            return False
        for weight in weights.values():
            weight.mul_(factor)
        before = {key: weight.detach().clone() for key, weight in weights.items()}
        try:
            deltas = [getattr(tried, f"get_delta_{key}")("default") for key in keys]
            tried.merge(adapter_names=["default"])
        except (TypeError, NotImplementedError, AttributeError, RuntimeError, ValueError):
            return False
        if not all(isinstance(d, Tensor) and d.shape == before[key].shape for key, d in zip(keys, deltas, strict=True)):
            return False
        expected = before | {key: before[key] + d.to(before[key]) for key, d in zip(keys, deltas, strict=True)}
        if not all(_close(getattr(base, key), value) for key, value in expected.items()):
            return False
        found.append(deltas)
    return all(_close(a, b) for a, b in zip(*found, strict=True))


def _close(a: Tensor, b: Tensor) -> bool:
    rounding = 64 * torch.finfo(b.dtype).eps
    return torch.allclose(a.to(b), b, rtol=rounding, atol=rounding * float(b.abs().max()))


def _tuner_layer() -> Any:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return BaseTunerLayer


def _adapters_of(layer: Any) -> set[str]:
    """The adapters that a layer has weights of."""
    return {name for key in layer.adapter_layer_names for name in getattr(layer, key)}


def _adapter_parameters(layer: Any) -> list[nn.Parameter]:
    base = {id(p) for p in layer.get_base_layer().parameters()}
    return [p for p in layer.parameters() if id(p) not in base]


def _deltas(model: Any) -> dict[str, Tensor]:
    names = base_names(model)
    found = {}
    for module in model.modules():
        layer: Any = module
        for key in PARTS if isinstance(layer, _tuner_layer()) and "default" in _adapters_of(layer) else ():
            if hasattr(layer, f"get_delta_{key}"):
                delta = getattr(layer, f"get_delta_{key}")("default")
                found[names[id(getattr(layer.get_base_layer(), key))]] = delta.detach().float()
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

    # a setting that came later is left out where it says what was so before: adapters stored then are the same
    old = {f.name: f.metadata["unwritten"] for f in dataclasses.fields(config) if "unwritten" in f.metadata}
    kept = {k: v for k, v in plain(config.to_dict()).items() if k not in old or v != old[k]}
    return {**kept, "inference_mode": True}


def as_tuner(tuner: Any) -> Tuner:
    """A tuner as it is, or a `PeftConfig` wrapped as one; a configuration may have a tuner of its own."""
    if isinstance(tuner, Tuner):
        return tuner
    return tuner.as_tuner() if hasattr(tuner, "as_tuner") else PeftTuner(tuner)
