"""An adapter or a model that was trained elsewhere: whether it fits a base and a recipe, and which recipe goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..core.errors import ConfigError, ModelError, first_line
from ..recipes import make_recipe
from ..recipes.recipe import Recipe
from ..tuners import AllWeights, PeftTuner
from ..tuners.peft_tuner import peft_dict

WEIGHTS = "adapter_model.safetensors"
# of a peft configuration, what does not change what is computed
ASIDE = ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type")


def adapter_config(folder: Path) -> Any:
    """The configuration of a peft adapter; None where it is a model.

    Raises:
        ModelError: neither is there.
    """
    import peft

    if (folder / "adapter_config.json").is_file():
        try:
            return peft.PeftConfig.from_pretrained(str(folder))
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ModelError(f"{folder / 'adapter_config.json'} cannot be read: {first_line(error)}") from error
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds neither a peft adapter (adapter_config.json) nor a model (config.json)")
    return None


def check_base(config: Any, model: str, folder: Path) -> None:
    said = config.base_model_name_or_path or ""
    here, there = Path(model), Path(said)
    places = [here.resolve(), *([here.resolve().parent] if here.suffix == ".gguf" else [])]  # peft names its folder
    same = said == model or here.name.lower() == there.name.lower() or there.resolve() in places
    if said and not same:
        raise ModelError(
            f"{folder} says that it was trained on `{said}`, and this is `{model}`: give that one (--model), or say "
            "that it is the same under another name (--same-base)"
        )


def check_fits(recipe: Recipe, config: Any, folder: Path) -> None:
    """
    Raises:
        ModelError: an adapter of another kind, or with parts that nothing has a place for.
        ConfigError: a recipe that keeps something else.
    """
    if config is None:
        if not isinstance(recipe.tuner, AllWeights):
            raise ConfigError(
                f"recipe `{recipe.name}` keeps adapters, and {folder} is a whole model: use task_arithmetic, "
                "ties, sotu or sequential, or adopt its adapter"
            )
        return
    if getattr(config.peft_type, "value", config.peft_type) != "LORA":
        raise ModelError(f"{folder} is no LoRA but {type(config).__name__}: only LoRA adapters are adopted")
    if not isinstance(recipe.tuner, PeftTuner) or type(recipe.tuner.config) is not type(config):
        raise ConfigError(
            f"recipe `{recipe.name}` trains no LoRA: use lora, olora, nlora …, or merge the adapter into its base and "
            "adopt that model"
        )
    whole = [*(config.modules_to_save or ()), *(config.trainable_token_indices or ())]
    if whole and recipe.consolidation.branch == "fresh":
        raise ModelError(
            f"{folder} saves whole modules beside its LoRA ({', '.join(map(str, whole))}), for which recipe "
            f"`{recipe.name}` has no place: use sequential_lora, which goes on with one adapter"
        )


def with_adapter(recipe: Recipe, config: Any, model: nn.Module) -> Recipe:
    """A recipe that goes on with adapters of this configuration: as it is where that is its own; else with the rank,
    scale, targets and dropout of the adapter as its settings; else with the configuration itself."""
    tried = [recipe]
    targets = config.target_modules
    plain = {"rank": config.r, "alpha": config.lora_alpha, "dropout": config.lora_dropout}
    plain["target"] = sorted(targets) if isinstance(targets, (set, list)) else targets
    try:
        tried.append(make_recipe({"name": recipe.name, **plain}))
    except ConfigError:  # a recipe without these settings
        pass
    for each in tried:
        own = each.tuner._resolved(model) if isinstance(each.tuner, PeftTuner) else None
        rest = {k: v for k, v in (each.to_dict() if own else {}).items() if k in ("rules", "consolidation")}
        if own and _settings(own) == _settings(config) and rest == {k: recipe.to_dict()[k] for k in rest}:
            return each.with_heads(recipe.heads)
    config.base_model_name_or_path, config.inference_mode, config.task_type = None, False, None
    return Recipe(config, recipe.rules, recipe.consolidation, recipe.heads, training=recipe.training, name=recipe.name)


def _settings(config: Any) -> dict[str, Any]:
    found = {k: v for k, v in peft_dict(config).items() if k not in ASIDE}
    targets = found["target_modules"]
    return {**found, "target_modules": sorted(targets) if isinstance(targets, list) else targets}


def adapter_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (folder / WEIGHTS).is_file():
        raise ModelError(f"{folder} has no {WEIGHTS}: save the adapter again with safe_serialization=True")
    try:
        found = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{folder / WEIGHTS} is damaged ({first_line(error)}): restore it from a copy") from error
    resized = [name for name in found if "embed" in name and "lora" not in name and "modules_to_save" not in name]
    if resized:
        raise ModelError(
            f"{folder} holds embeddings (`{resized[0]}`), since tokens were added to its base: resize the base's "
            "embeddings, save that with the tokenizer, and adopt the adapter without them (save_embedding_layers=False)"
        )
    return found
