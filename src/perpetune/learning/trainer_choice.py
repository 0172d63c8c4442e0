"""Which trainer a run has, and what responses stand behind: chosen at its first start, and written to run.yaml."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..core.errors import ConfigError
from ..core.processes import launched
from ..models.backbone import Backbone
from ..models.language_model import LanguageBackbone
from ..recipes.recipe import Recipe
from ..runs.config_file import read_config
from ..streams import Stream
from ..streams.free_texts import check_classes, stripped
from .training_defaults import take_language_defaults

if TYPE_CHECKING:
    from .setup import Setup

TrainerName = Literal["trl", "perpetune"]
OLD: TrainerName = "perpetune"  # of runs that do not say
LEAST = (1, 16)
AUTO = "auto"  # a blank between prompt and response, unless the prompt ends with one

# names of TRL's SFTConfig, besides those of TrainingArguments
HONOURED = frozenset(
    "packing packing_strategy padding_free pad_to_multiple_of completion_only_loss assistant_only_loss loss_type "
    "activation_offloading router_aux_loss_coef".split()
)
OURS = {"max_length": "max-length", "trust_remote_code": "trust-remote-code"}
_REASONS = {
    "the run loads the model": "model_init_kwargs",
    "rows become tokens in one way, in training as in evaluation": (
        "chat_template_path dataset_text_field dataset_kwargs dataset_num_proc eos_token pad_token truncation_mode"
    ),
    "the order of the rows is drawn from the seed": "shuffle_dataset",
    "the run evaluates by itself": "eval_packing",
}
REFUSED = {name: reason for reason, names in _REASONS.items() for name in names.split()}


def settle(setup: Setup, stream: Stream, backbone: Backbone) -> Stream:
    """Settings that are chosen at the first start of a run: its trainer, "trl" (TRL's `SFTTrainer`) for language models
    where it is installed and can train them, else "perpetune"; what stands between prompts and responses, nothing, or
    "auto" (a blank, unless the prompt ends with one) where prompts were posed; and training settings of language models
    that nobody gave. A run that is there goes on with its own; one that says nothing, as all runs began at first.

    Returns:
        The stream, its responses as the run has read them.

    Raises:
        ConfigError: TRL is asked for, and cannot train this; a task of a new run that needs a metric.
    """
    if not isinstance(backbone, LanguageBackbone):
        if setup.trainer == "trl" and stream.modality != "language":  # a control without a network trains by itself
            raise ConfigError("trainer `trl` trains language models on prompts, and this stream has none: leave it out")
        setup.trainer = OLD
        return stream
    take_language_defaults(setup)
    written = read_config(setup.path) if (Path(setup.path) / "run.yaml").is_file() else None
    if written is not None:
        adopt(setup, written)
        stream = stream if "trainer" in written else stripped(stream)
    chosen = bool(written and written["stream"]["labels"])  # that responses are classes
    if not (chosen or setup.heads_given or stream.source.get("pose")):  # posed labels are classes, however many
        check_classes(stream)
    if written is None:
        posed = stream.source.get("pose") in ("instruction", "published")
        if setup.response_prefix is None:  # the prompts of templates end with `Answer:`
            setup.response_prefix = AUTO if posed else ""
        why = not_trl(backbone, setup.recipe)
        if setup.trainer is None:
            setup.trainer = "perpetune" if why else "trl"
            by = f"TRL's SFTTrainer {version('trl')}" if not why else f"perpetune's own trainer ({why})"
            setup.progress.say(f"this run is trained by {by}; choose with trainer: trl or perpetune")
    if setup.trainer == "trl" and (why := not_trl(backbone, setup.recipe)):
        raise ConfigError(f"trainer `trl` cannot train this run: {why}; leave it out, or set trainer: perpetune")
    setup.put_prefix(backbone)
    return stream


def settled(config: dict[str, Any]) -> dict[str, Any]:
    """What a run.yaml says of the settings that `settle` chooses."""
    model = config["model"]
    if model["modality"] != "language":
        return {}
    return {"trainer": config.get("trainer", OLD), "response_prefix": model.get("response_prefix", AUTO)}


def adopt(setup: Setup, written: dict[str, Any]) -> None:
    """Give a setup what its run.yaml says of the settings that it leaves open."""
    then = settled(written)
    setup.trainer = setup.trainer or then.get("trainer", OLD)
    if setup.response_prefix is None:
        setup.response_prefix = then.get("response_prefix", AUTO)


def not_trl(backbone: LanguageBackbone, recipe: Recipe) -> str | None:
    """Why TRL cannot train this model with this recipe; None where it can."""
    if backbone.start is not None:
        return "the model is an encoder and a decoder"
    if type(backbone) is not LanguageBackbone:
        return "the model reads images"
    if backbone.model.get_output_embeddings() is None or not hasattr(backbone.model, "base_model"):
        return "the model has no head that TRL could fuse"
    if next(backbone.model.parameters()).device.type != "cpu" and torch.accelerator.device_count() > launched() == 1:
        return "several GPUs are visible, and TRL trains on one: set CUDA_VISIBLE_DEVICES"
    targets = getattr(getattr(recipe.tuner, "config", None), "target_modules", None)
    output = next(n for n, m in backbone.model.named_modules() if m is backbone.model.get_output_embeddings())
    if isinstance(targets, (list, set, tuple)) and any(f".{output}".endswith(f".{name}") for name in targets):
        return f"the tuner adapts `{output}`, which TRL's loss reads without adapters"
    try:
        found = version("trl")
    except PackageNotFoundError:
        return "TRL is not installed: pip install 'perpetune[language]'"
    if tuple(map(int, found.split(".")[:2])) < LEAST:
        return f"TRL {found} is older than {LEAST[0]}.{LEAST[1]}: pip install --upgrade trl"
    return None


def check_trl_settings(settings: dict[str, Any], trainer: str | None, stream: Stream) -> None:
    """
    Raises:
        ConfigError: settings of TRL for a run that another trainer trains; a loss on turns of what has none.
    """
    given = sorted(name for name in HONOURED if name in settings)
    if given and trainer != "trl":
        raise ConfigError(f"`{given[0]}` is a setting of TRL's SFTTrainer, which does not train this run: leave it out")
    if settings.get("assistant_only_loss") and "messages" not in stream.inputs:
        raise ConfigError("assistant_only_loss is for conversations, and this stream has no `messages`: leave it out")
    if settings.get("assistant_only_loss") and settings.get("completion_only_loss") is False:
        raise ConfigError("assistant_only_loss and completion_only_loss: false contradict each other: choose one")
    if settings.get("stm") is not None and stream.modality != "language":
        raise ConfigError("stm masks tokens of responses, and this stream has none: leave it out")


def sft_settings(own: dict[str, Any], block: int | None) -> dict[str, Any]:
    """What `SFTConfig` is made with: settings that it has other defaults for than TrainingArguments have theirs; those
    that decide which tokens carry loss are left out, for the labels that it is given say so (`token_rows`).

    Args:
        block: tokens of a row, where rows are packed; nothing is cut here else.
    """
    again = own.get("activation_checkpointing") or own.get("gradient_checkpointing") or False
    left_out = ("activation_checkpointing", "gradient_checkpointing", "assistant_only_loss", "completion_only_loss")
    given = {k: v for k, v in own.items() if k not in left_out}
    return {
        "bf16": False,
        **given,
        "gradient_checkpointing": again,
        "max_length": block if own.get("packing") else None,
    }
