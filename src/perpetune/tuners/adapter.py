"""Bottleneck adapters: a narrow network of two matrices beside or behind a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from ..core.errors import ConfigError, ModelError, nearest
from .key_projections import counted, key_projections
from .peft_plugin import OwnConfig, OwnLayer, OwnTuner, register
from .targets import ATTENTIONS, BLOCK_OUTPUTS, resolve_targets

NOT_MERGEABLE = "a bottleneck adapter is not linear, and no weight could hold it: keep it as an adapter"


@dataclass
class AdapterConfig(OwnConfig):
    """A bottleneck of m units without biases, at the outputs of attention and feed-forward network.

    "parallel"    h = f(x) + W_u act(W_d x)
    "sequential"  h = f(x) + W_u act(W_d f(x))

    f is a linear layer, or a module made of some, such as a whole attention: x is then the first thing it is called
    with, d_in what its first linear layer reads, f(x) the first thing it returns. `target_modules="attentions"` finds
    the modules that hold the key projections; `layers_to_transform` then counts these.

    W_d: m x d_in (m x d_out where sequential), Kaiming; W_u: d_out x m, 0, so that training starts from the model as it
    is. act(0) = 0, so that what both matrices map to 0 leaves h as it was: the projection rule rests on it. Several
    active adapters add up.

    Sources: Houlsby et al. (1902.00751), sequential, there with biases; He et al. (2110.04366), parallel.

    Raises:
        ConfigError: a width below 1, an unknown form, an activation that is unknown, not 0 at 0, or itself trained.
    """

    bottleneck: int = field(default=64, metadata={"help": "Width m."})
    form: Literal["parallel", "sequential"] = field(
        default="parallel", metadata={"help": "Whether the adapter reads what the layer reads or what it puts out."}
    )
    activation: str = field(default="gelu", metadata={"help": "Name in `transformers.activations.ACT2FN`."})
    kaiming_a: float = field(
        default=0.0, metadata={"help": "W_d starts as U(+-sqrt(6 / ((1 + a^2) d))); sqrt(5) as `nn.Linear` does."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "perpetune_adapter"
        if not isinstance(self.bottleneck, int) or self.bottleneck < 1:
            raise ConfigError(f"AdapterConfig: `bottleneck` = {self.bottleneck!r}: give a width of at least 1")
        if self.form not in ("parallel", "sequential"):
            raise ConfigError(f'AdapterConfig: `form` = {self.form!r}: use "parallel" or "sequential"')
        if self.activation not in ACT2FN:
            raise ConfigError(f"no activation is called `{self.activation}`: {nearest(self.activation, ACT2FN)}")
        act = ACT2FN[self.activation]
        if any(True for _ in act.parameters()) or act(torch.zeros(1, device="cpu")).item() != 0:
            raise ConfigError(f"activation `{self.activation}` is trained itself or not 0 at 0: use gelu, relu or silu")


class AdapterLinear(OwnLayer):
    """f(x) of a linear layer with its adapters; see `AdapterConfig`."""

    adapter_layer_names = ("perpetune_adapter_down", "perpetune_adapter_up")
    other_param_names = ("perpetune_adapter_act", "perpetune_adapter_form")

    def _containers(self) -> None:
        self.perpetune_adapter_down = nn.ModuleDict()
        self.perpetune_adapter_up = nn.ModuleDict()
        self.perpetune_adapter_act: dict[str, Callable[[Tensor], Tensor]] = {}
        self.perpetune_adapter_form: dict[str, str] = {}

    def _new(self, adapter_name: str, config: AdapterConfig) -> None:
        base: Any = self.get_base_layer()
        d_in, d_out = _widths(base)
        down = nn.Linear(d_in if config.form == "parallel" else d_out, config.bottleneck, bias=False)
        up = nn.Linear(config.bottleneck, d_out, bias=False)
        nn.init.kaiming_uniform_(down.weight, a=config.kaiming_a)
        nn.init.zeros_(up.weight)
        if not hasattr(base, "weight"):  # peft would not know where to put them
            like = next(p for p in base.parameters() if p.is_floating_point())
            down, up = down.to(like), up.to(like)
        self.perpetune_adapter_down[adapter_name] = down
        self.perpetune_adapter_up[adapter_name] = up
        self.perpetune_adapter_act[adapter_name] = ACT2FN[config.activation]
        self.perpetune_adapter_form[adapter_name] = config.form

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        live = self._live(self.perpetune_adapter_down)
        x = args[0] if args else next(iter(kwargs.values()))
        found = self.base_layer(*args, **kwargs)
        f = found[0] if isinstance(found, tuple) else found
        h = f
        for name in live:
            W_d: Any = self.perpetune_adapter_down[name]
            W_u: Any = self.perpetune_adapter_up[name]
            read = x if self.perpetune_adapter_form[name] == "parallel" else f
            h = h + W_u(self.perpetune_adapter_act[name](W_d(read.to(W_d.weight.dtype))))
        return (h.to(f.dtype), *found[1:]) if isinstance(found, tuple) else h.to(f.dtype)

    def factors(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """(W_d, W_u) of every active adapter, W_u reading act(W_d x) with act(0) = 0."""
        if self.disable_adapters:
            return []
        down: Any = self.perpetune_adapter_down
        up: Any = self.perpetune_adapter_up
        return [(down[name].weight, up[name].weight) for name in self.active_adapters if name in down]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ModelError(NOT_MERGEABLE)


def _widths(base: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of a linear layer, or of the first and the last one in a module."""
    linear: list[Any] = [m for m in base.modules() if isinstance(m, nn.Linear | Conv1D)]
    shapes = [m.weight.shape if isinstance(m, Conv1D) else (m.in_features, m.out_features) for m in linear]
    return shapes[0][0], shapes[-1][1]


class AdapterModel(OwnTuner):
    """A model with bottleneck adapters."""

    prefix = "perpetune_adapter_"
    tuner_layer_cls = AdapterLinear

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        if peft_config.target_modules in (None, BLOCK_OUTPUTS):
            peft_config.target_modules = set(resolve_targets(self.model, BLOCK_OUTPUTS))
        if peft_config.target_modules == ATTENTIONS:
            keys = counted(self.model, key_projections(self.model), peft_config.layers_to_transform)
            peft_config.target_modules = {name.rpartition(".")[0] for name in keys}
            peft_config.layers_to_transform = None
        return peft_config

    def _new_layer(self, config: AdapterConfig, adapter_name: str, target: nn.Module, key: str) -> nn.Module:
        if not any(isinstance(part, nn.Linear | Conv1D) for part in target.modules()):
            raise ModelError(
                f"`{key}` is a {type(target).__name__}: adapters stand at linear layers, or at what holds some, leave "
                "it out"
            )
        return super()._new_layer(config, adapter_name, target, key)

    def _check_merge_allowed(self) -> None:
        raise ModelError(NOT_MERGEABLE)

    @torch.no_grad()
    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Add the adapter whose output is sum_i weights[i] * (output of adapters[i]), exactly; frozen and inactive.

        Its hidden units are those of all, end to end: W_d = [W_d1; W_d2; ...], W_u = [w_1 W_u1, w_2 W_u2, ...].

        Args:
            adapters: names of adapters of one form and activation.
            weights: one a name.
            adapter_name: of the new adapter.

        Raises:
            ModelError: an unknown name, a name that is taken, or adapters that cannot be added up.
        """
        if len(adapters) != len(weights) or not adapters:
            raise ModelError(f"{len(adapters)} adapters and {len(weights)} weights: give one weight for each adapter")
        for name in adapters:
            if name not in self.peft_config:
                raise ModelError(f"there is no adapter `{name}`: {nearest(name, self.peft_config)}")
        if adapter_name in self.peft_config:
            raise ModelError(f"there is an adapter `{adapter_name}`: choose another name")
        configs: list[Any] = [self.peft_config[name] for name in adapters]
        if len({(c.form, c.activation) for c in configs}) > 1:
            raise ModelError("these adapters differ in form or activation: add up those that agree in both")
        if any(c.modules_to_save for c in configs):
            raise ModelError("trained heads cannot be added up: use adapters without `modules_to_save`")
        layers = {
            key: layer
            for key, layer in self.model.named_modules()
            if isinstance(layer, AdapterLinear) and not layer._get_available_adapters().isdisjoint(adapters)
        }
        self.peft_config[adapter_name] = replace(
            configs[0],
            bottleneck=sum(c.bottleneck for c in configs),
            target_modules=set(layers),
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
        )
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            del self.peft_config[adapter_name]
            raise
        self._cast_adapter_dtype(adapter_name)
        for layer in layers.values():
            down: Any = layer.perpetune_adapter_down
            up: Any = layer.perpetune_adapter_up
            first = 0
            for name, config, weight in zip(adapters, configs, weights, strict=True):
                units = slice(first, first + config.bottleneck)
                if name in down:  # else these units stay without output here
                    down[adapter_name].weight[units] = down[name].weight
                    up[adapter_name].weight[:, units] = weight * up[name].weight
                first = units.stop


register("perpetune_adapter", AdapterConfig, AdapterModel)
