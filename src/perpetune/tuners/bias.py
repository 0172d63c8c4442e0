"""BitFit: the biases are trained, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core.errors import ModelError, RuleError
from ..models.towers import decoder_name
from .linear_map import LinearMap, Tap
from .peft_plugin import OwnConfig, OwnLayer, OwnTuner, register
from .targets import UNCALLED_PARTS

ADVICE = (
    "leave `target_modules` empty to find those with one, name the list of layers in `layers_pattern` if you chose "
    "layers, or use another tuner"
)


@dataclass
class BiasConfig(OwnConfig):
    """A trained change db of the bias of every targeted layer: y = f(x) + db, db = 0 at the start.

    `target_modules=None` finds every linear and LayerNorm layer with a bias. Targeted layers without one are passed
    over. A merged change is added to the bias.

    Source: Zaken et al., BitFit (2106.10199).
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "perpetune_bias"


class BiasLayer(OwnLayer):
    """f(x) of a layer with changes of its bias, which is added along the last dimension of what it puts out."""

    adapter_layer_names = ("perpetune_bias_db",)

    def _containers(self) -> None:
        self.perpetune_bias_db = nn.ParameterDict()
        self.perpetune_bias_tap = Tap()
        self._unmerged: Tensor | None = None  # the bias before merging

    def _new(self, adapter_name: str, config: BiasConfig) -> None:
        self.perpetune_bias_db[adapter_name] = nn.Parameter(torch.zeros_like(self.bias))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        live = self._live(self.perpetune_bias_db)
        f = self.base_layer(x, *args, **kwargs)
        if live and self.perpetune_bias_tap.listening:
            self.perpetune_bias_tap(x.new_ones(*x.shape[:-1], 1))
        y = f
        for name in live:
            y = y + self.perpetune_bias_db[name]
        return y.to(f.dtype)

    def linear_maps(self, condition: str) -> list[LinearMap]:
        """The trained db as a map of the constant 1, whatever the condition: W = db (d x 1).

        Raises:
            RuleError: the layer trains two changes at once.
        """
        trained = [
            db for name, db in self.perpetune_bias_db.items() if name in self.active_adapters and db.requires_grad
        ]
        if len(trained) > 1:
            raise RuleError(f"a layer trains {len(trained)} changes of its bias at once: freeze all but the current")
        return [LinearMap("bias", db, (self.perpetune_bias_tap,), view=lambda v: v.unsqueeze(-1)) for db in trained]

    def get_delta_bias(self, adapter_name: str) -> Tensor:
        """db."""
        return self.perpetune_bias_db[adapter_name]

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """bias <- bias + sum db, in fp32 and rounded once.

        Raises:
            ModelError: (with `safe_merge`) the sum is not finite.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.perpetune_bias_db]
        if not names:
            return
        before = self.bias.detach().clone() if self._unmerged is None else self._unmerged
        total = before.to(torch.promote_types(before.dtype, torch.float32))
        for name in [*self.merged_adapters, *names]:
            total = total + self.perpetune_bias_db[name]
        if safe_merge and not total.isfinite().all():
            raise ModelError(f"the merged bias would not be finite: adapter {', '.join(names)} is broken")
        self._unmerged = before
        self.bias.copy_(total)
        self.merged_adapters += names

    @torch.no_grad()
    def unmerge(self) -> None:
        """The bias as it was, to the bit."""
        if self._unmerged is not None:
            self.bias.copy_(self._unmerged)
        self._unmerged = None
        self.merged_adapters.clear()


class BiasLinear(BiasLayer):
    """The same for linear layers: by "Linear" in the name peft knows one that is wrapped ("all-linear")."""


class BiasModel(OwnTuner):
    """A model with changed biases."""

    prefix = "perpetune_bias_"
    tuner_layer_cls = BiasLayer

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        if peft_config.target_modules is None:
            decoder = decoder_name(self.model)
            names = {name for name in _biased(self.model) if name.startswith(decoder)}
            # peft does not count layers for whole names, so that it is asked about their ends.
            ends = replace(peft_config, target_modules={name.rpartition(".")[2] for name in names})
            peft_config.target_modules = {name for name in names if self._check_target_module_exists(ends, name)}
            if not peft_config.target_modules:
                raise ModelError(f"{self._kind()} has no layer with a bias there: {ADVICE}")
        return peft_config

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if not any(isinstance(m, BiasLayer) and adapter_name in m.perpetune_bias_db for m in model.modules()):
            raise ModelError(f"none of the targeted modules of {self._kind()} has a bias: {ADVICE}")

    def _adapts(self, target: nn.Module, key: str) -> bool:
        base = target.get_base_layer() if isinstance(target, BiasLayer) else target
        if getattr(base, "bias", None) is None:
            return False
        if not _takes(base):
            raise ModelError(
                f"the bias of `{key}` ({type(base).__name__}) is not known to lie along the last dimension of what it "
                "puts out: add it to `exclude_modules`"
            )
        return True

    def _new_layer(self, config: BiasConfig, adapter_name: str, target: nn.Module, key: str) -> nn.Module:
        return (BiasLayer if isinstance(target, nn.LayerNorm) else BiasLinear)(target, adapter_name, config)

    def _kind(self) -> str:
        return type(self.model).__name__


def _takes(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.LayerNorm | Conv1D) and module.bias is not None and module.bias.ndim == 1


def _biased(module: nn.Module, path: str = "") -> Iterator[str]:
    """Names of the layers with a bias that are called as layers."""
    for key, child in module.named_children():
        if _takes(child) or isinstance(child, BiasLayer):
            yield path + key
        elif not isinstance(child, UNCALLED_PARTS):
            yield from _biased(child, f"{path}{key}.")


register("perpetune_bias", BiasConfig, BiasModel)
