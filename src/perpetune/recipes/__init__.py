"""The table: every published system as a few lines, under its own name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from ..core import plugins
from ..core.errors import ConfigError, nearest
from ..core.validation import call_checked
from . import (
    controls,
    deltas,
    drift,
    ensembles,
    first_task,
    lora_family,
    masks,
    merging,
    projection,
    rotations,
    routing,
    weight_spectra,
)
from .recipe import Recipe

RECIPES: dict[str, Callable[..., Recipe]] = {
    make.__name__: make
    for make in (
        controls.sequential,
        lora_family.sequential_lora,
        drift.sequential_sldc,
        lora_family.lora,
        lora_family.olora,
        lora_family.olora_released,
        lora_family.nlora,
        lora_family.nlora_released,
        lora_family.olora_nlora,
        projection.pegp_adapter,
        projection.pegp_adapter_released,
        projection.pegp_lora,
        projection.pegp_lora_released,
        projection.pegp_lora_fresh,
        projection.inflora,
        projection.pegp_prompt,
        projection.pegp_prompt_released,
        projection.pegp_prefix,
        projection.pegp_prefix_released,
        projection.pegp_bias,
        projection.pegp_ia3,
        projection.gpm,
        projection.gpm_released,
        weight_spectra.osf,
        weight_spectra.oplora,
        masks.child_tuning_f,
        masks.child_tuning_f_update,
        masks.child_tuning_d,
        masks.child_tuning_d_released,
        masks.sam,
        masks.sam_released,
        rotations.oft,
        rotations.coft,
        rotations.goft,
        rotations.goft_norm,
        rotations.qgoft,
        deltas.sotu,
        deltas.sotu_disjoint,
        deltas.soup,
        deltas.task_arithmetic,
        deltas.ties,
        merging.slao,
        merging.opcm,
        routing.color,
        routing.color_adapted,
        routing.color_oracle,
        routing.routed,
        routing.routed_product,
        routing.routed_layers,
        routing.default,
        first_task.ranpac,
        first_task.aper,
        controls.anacp,
        ensembles.ease,
        ensembles.ease_released,
        ensembles.tuna,
        controls.replay,
        controls.joint,
        controls.frozen_ncm,
        controls.frozen_ridge,
        controls.frozen_lda,
        controls.frozen_best,
        controls.frozen_label_text,
        controls.tfidf_ridge,
        controls.pixels_ridge,
    )
}


def make_recipe(recipe: str | dict[str, Any] | Recipe) -> Recipe:
    """A recipe from its name, from `{name: NAME, setting: value, ...}`, from the four slots spelled out, or as it is.

    Names are those of `RECIPES`, and of the recipes that installed packages bring (`core/plugins.py`).

    Raises:
        ConfigError: an unknown recipe, slot or setting, with the nearest known names; or an installed recipe that
            cannot be imported, returns no recipe, or has the name of another.
    """
    if isinstance(recipe, Recipe):
        return recipe
    data = {"name": recipe} if isinstance(recipe, str) else dict(recipe)
    if "tuner" in data:
        return Recipe.from_dict(data)
    name = str(data.pop("name", None))
    known = plugins.with_installed(RECIPES, name, group=plugins.RECIPES)
    if name not in known:
        names = [*RECIPES, *(point.name for point in plugins.installed(plugins.RECIPES))]
        raise ConfigError(f"no recipe is called `{name}`: {nearest(name, names)}")
    make = known[name]
    if not callable(make):
        raise ConfigError(f"the installed recipe `{name}` is no function that returns a Recipe, but {make!r}")
    accepted = list(inspect.signature(make).parameters)
    for key in data:
        if key not in accepted:
            raise ConfigError(f"recipe `{name}` has no setting `{key}`: {nearest(key, accepted or ['none'])}")
    made = call_checked(f"recipe `{name}`", make, data)
    if not isinstance(made, Recipe):
        raise ConfigError(f"the installed recipe `{name}` returns {type(made).__name__}, and not a Recipe")
    made.name = name
    return made
