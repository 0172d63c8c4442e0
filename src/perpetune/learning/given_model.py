"""The model that a trainer was given: plain, or with a new adapter on it; and what becomes of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ModelError
from ..models.backbone import Backbone
from ..recipes.recipe import Recipe
from ..tuners import Additive, PeftTuner
from ..tuners.peft_tuner import peft_dict
from .adopted_files import ASIDE


class GivenModel:
    """The base model within what a trainer was given, which stays the trainer's own object all the time.

    Attributes:
        base: without an adapter; peft: whether it came with one.
    """

    def __init__(self, model: Any, recipe: Recipe, newest: Mapping[str, Tensor]) -> None:
        """
        Args:
            newest: the adapter of the run's last task, where tasks go on with one.

        Raises:
            ModelError: see `plain_model`.
        """
        self.recipe = recipe
        self.base: Any
        self.base, self._on = plain_model(model, recipe, newest)
        self.peft = self._on is not None
        self._weights: list[tuple[nn.Parameter, Tensor]] = []
        self._tensors: dict[str, Tensor] = {}

    def dressed(self, backbone: Backbone) -> None:
        """The recipe's adapter is on it.

        Raises:
            ModelError: the adapter that it came with was on other modules.
        """
        ours = adapted(backbone.model)
        if self._on is not None and self._on != ours:
            name = sorted(self._on ^ ours)[0]
            raise ModelError(
                f"the model's adapter is not where recipe `{self.recipe.name}` has its own (`{name}` is in one of them "
                "alone): give the trainer the plain model, and Keep puts the adapter on"
            )
        self._tell(backbone)

    def _tell(self, backbone: Backbone) -> None:
        """transformers saves and checkpoints a model that is no PeftModel otherwise when it knows of its adapter."""
        if not self.peft:
            self.base._hf_peft_config_loaded = hasattr(backbone.model, "peft_config")

    @contextmanager
    def in_its_precision(self) -> Iterator[None]:
        """Without the autocast that a trainer puts around a model in bf16 or fp16, so that scores before and after, and
        merged and unmerged outputs, can be compared."""
        around, own = self.base.__dict__.get("forward"), self.base.__dict__.get("_original_forward")
        if own is None:
            yield
            return
        self.base.forward = own
        try:
            yield
        finally:
            self.base.forward = around

    def trained(self, backbone: Backbone) -> None:
        """Remember what training left, of a model that came with an adapter."""
        if not self.peft:
            return
        layers = [module for module in backbone.model.modules() if isinstance(module, _tuner_layer())]
        weights = [p for layer in layers for p in layer.get_base_layer().parameters()]
        self._weights = [(p, p.detach().clone()) for p in weights]
        tensors = self.recipe.tuner.tensors(backbone.model)
        self._tensors = {name: t.detach().clone() for name, t in tensors.items()}

    @torch.no_grad()
    def hand_back(self, backbone: Backbone) -> None:
        """A model that came with an adapter goes back with it, as training left both; a plain one is what the run
        predicts with."""
        if self.peft and not hasattr(backbone.model, "peft_config"):
            backbone.model = self.recipe.tuner.attach(backbone.model)
            self.recipe.tuner.load(backbone.model, self._tensors)
            for parameter, value in self._weights:
                parameter.copy_(value)
        self._weights = []
        self._tell(backbone)


def adapted(model: nn.Module) -> set[str]:
    """The names that modules with an adapter have in the base model."""
    names = {name for name, module in model.named_modules() if isinstance(module, _tuner_layer())}
    return {name.removeprefix("base_model.model.") for name in names}


def _tuner_layer() -> Any:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return BaseTunerLayer


def plain_model(model: Any, recipe: Recipe, newest: Mapping[str, Tensor]) -> tuple[nn.Module, set[str] | None]:
    """The base model of what the trainer was given, with an adapter that is still at its start taken off; and the names
    of the modules that this adapter was on, None where there was none.

    Args:
        newest: the adapter of the run's last task, where tasks go on with one.

    Raises:
        ModelError: an adapter that is not the recipe's, that was trained, or that an earlier training left.
    """
    from peft import PeftModel

    layers = adapted(model)
    if not isinstance(model, PeftModel):
        if layers or hasattr(model, "peft_config"):
            raise ModelError("the model has an adapter of an earlier training in it: load it anew for every task")
        return model, None
    mine = f"give the trainer the plain model, and Keep puts the adapter of recipe `{recipe.name}` on"
    if not isinstance(recipe.tuner, PeftTuner):
        raise ModelError(f"recipe `{recipe.name}` trains no adapter, and the model has one: {mine}")
    if list(model.peft_config) != ["default"]:
        raise ModelError(f"the model has the adapters {', '.join(model.peft_config)}: {mine}")
    theirs, ours = (
        {k: v for k, v in peft_dict(config).items() if k not in (*ASIDE, "target_modules")}
        for config in (model.peft_config["default"], recipe.tuner.config)
    )
    differs = next((k for k in sorted({*theirs, *ours}) if theirs.get(k) != ours.get(k)), None)
    if differs is not None or type(model.peft_config["default"]) is not type(recipe.tuner.config):
        what = f"{differs} is {theirs.get(differs or '')!r} in it and {ours.get(differs or '')!r} in the recipe"
        if differs is None:
            what = f"it is of another kind, {type(model.peft_config['default']).__name__}"
        raise ModelError(f"the model's adapter is not that of recipe `{recipe.name}`, {what}: {mine}, or change either")
    now = recipe.tuner.tensors(model)
    goes_on = newest.keys() == now.keys() and all(torch.equal(newest[k], v.cpu()) for k, v in now.items())
    change = recipe.tuner.change(model)
    fresh = isinstance(change, Additive) and not any(bool(delta.any()) for delta in change.deltas().values())
    if not (fresh or goes_on):
        raise ModelError(
            f"the model's adapter is not at its start: {mine}; to go on from one that was trained, `perpetune adopt` it"
        )
    return model.unload(), layers
